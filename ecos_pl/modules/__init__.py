"""LightningModules: one training method per file."""
