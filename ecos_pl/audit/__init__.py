"""Audit of the releases as installed: run ``python -m ecos_pl.audit`` (see `__main__`)."""
