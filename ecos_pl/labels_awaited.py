"""The proxy set is chosen and people are to label it: a run ends here, and goes on another day."""

from __future__ import annotations


class LabelsAwaited(Exception):
    """There are no labels yet: not an error; the text says what to do next, in lines."""
