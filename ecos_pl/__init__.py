"""ECOS in PyTorch Lightning: train a client's model on the cloud without its data."""
