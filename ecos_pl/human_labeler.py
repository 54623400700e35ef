"""Labels from people, who come after the probe: while it runs, nobody labels anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ecos_pl.labeling import LabelingTask, Labels
from ecos_pl.privacy import Release


class HumanLabeler:
    """Leaves the proxy set without labels, for `outsourced_labels.py` to lay them over it.

    So the probe is done, and the client has answered, before the first label exists; labels that
    arrive later change nothing of what was asked and chosen.

    Args:
        classes: Names of the client's classes.
    """

    name = "human"
    features = "final"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    def facts(self) -> dict[str, Any]:
        """See `Labeler`."""
        return {"classes": self.classes}

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """The client releases nothing."""
        return []

    def label(self, task: LabelingTask) -> Labels:
        """No label, weight 0 throughout."""
        num = len(task.indices)
        return Labels(self.classes, torch.zeros(num, len(self.classes)), torch.zeros(num))
