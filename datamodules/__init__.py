"""Pools and clients from real data, and the LightningDataModule that probes them."""
