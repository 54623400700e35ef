"""Which pseudo-labels count, and how they are corrected: FlexMatch's curriculum, alignment.

Shapes: N unlabelled images, B of them in a batch, K classes.

The functions are the methods; the classes keep what they remember from step to step. It belongs
to the training, not to the model: it is in checkpoints, but neither averaged nor delivered with the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NOT_YET = -1  # no confident prediction so far
_NUM_MEANS = 128
"""Batches in the running mean (Berthelot et al. 2020, §3.1)."""


def flexible_thresholds(
    num_learned: Tensor, num_images: int, threshold: float, least: float = 0.0
) -> Tensor:
    """FlexMatch's threshold of each class [K] (Zhang et al. 2021, eqs. 7, 11 and 12).

    The fewer images are learned as a class, beside the class learned best, the lower its
    threshold. While most images are not learned as anything, their number stands in for the best
    class (the warm-up): all thresholds begin at 0. The mapping x / (2 - x) is convex, so that they
    rise late. Where training is short, ``least`` keeps it from learning what the model guesses in
    its first steps; the paper has none.

    Args:
        num_learned: [K] int64, images whose latest prediction above ``threshold`` was the class.
        num_images: N.
        threshold: That of a class learned as well as any.
        least: No threshold is below it.
    """
    not_yet = num_images - num_learned.sum()
    share = num_learned / torch.maximum(num_learned.max(), not_yet).clamp_min(1)
    return (threshold * share / (2 - share)).clamp_min(min(least, threshold))


def aligned(probabilities: Tensor, wanted: Tensor, mean: Tensor) -> Tensor:
    """Predictions [B, K] moved towards the wanted class frequencies (ReMixMatch's alignment).

    Berthelot et al. 2020, §3.1: each is multiplied by ``wanted / mean`` and made to sum to one
    again, which undoes a lean of the model towards the classes it likes.

    Args:
        probabilities: [B, K].
        wanted: [K], class frequencies.
        mean: [K], of the model's own predictions, averaged over many images.
    """
    tiny = torch.finfo(torch.float32).eps
    moved = probabilities * (wanted / mean.clamp_min(tiny))
    return moved / moved.sum(dim=1, keepdim=True).clamp_min(tiny)


class Curriculum:
    """FlexMatch's record of what each unlabelled image was last learned as.

    Args:
        num_images: N.
        num_classes: K.
        device: Where the training steps run.

    Attributes:
        record: [N] int64, the class; -1 for none yet.
        num_learned: [K] int64, images of each class in the record.
    """

    def __init__(self, num_images: int, num_classes: int, device: torch.device) -> None:
        self.record = torch.full((num_images,), _NOT_YET, device=device)
        self.num_learned = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def thresholds(self, threshold: float, least: float = 0.0) -> Tensor:
        """See ``flexible_thresholds``: [K]."""
        return flexible_thresholds(self.num_learned, len(self.record), threshold, least)

    def update(self, rows: Tensor, probabilities: Tensor, threshold: float) -> None:
        """Take down the predictions that are sure enough; others leave the record as it is.

        Nothing here waits for a GPU.

        Args:
            rows: [B], the images' places in the record, none twice.
            probabilities: [B, K].
            threshold: Least probability.
        """
        confidence, classes = probabilities.max(dim=1)
        before = self.record[rows]
        after = torch.where(confidence > threshold, classes, before)
        self.record[rows] = after
        num_classes = len(self.num_learned)
        change = [F.one_hot(one + 1, num_classes + 1).sum(dim=0)[1:] for one in (after, before)]
        self.num_learned += change[0] - change[1]

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"record": self.record}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It was made with another number of unlabelled images.
        """
        record = state["record"].to(self.record.device)
        if record.shape != self.record.shape:
            raise ValueError(
                f"the checkpoint has seen {len(record):,} unlabelled images, here are "
                f"{len(self.record):,}: train on the same proxy set, or in a new run folder"
            )
        self.record = record
        self.num_learned = F.one_hot(record + 1, len(self.num_learned) + 1).sum(dim=0)[1:]


class Alignment:
    """The running mean of predictions, over the last 128 batches.

    Args:
        num_classes: K.
        device: Where the training steps run.

    Attributes:
        means: [at most 128, K], of each batch, the newest last.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.means = torch.empty(0, num_classes, device=device)

    def __call__(self, probabilities: Tensor, wanted: Tensor, batch_mean: Tensor) -> Tensor:
        """Align predictions [B, K] with ``wanted`` [K] after counting in their mean [K].

        The mean is given, since it is that of all devices' images.
        """
        self.means = torch.cat([self.means, batch_mean[None]])[-_NUM_MEANS:]
        return aligned(probabilities, wanted, self.means.mean(dim=0))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"means": self.means}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.means = state["means"].to(self.means.device)


class PseudoLabels:
    """Predictions on weak views as the loss takes them, and from which confidence they count.

    Args:
        num_classes: K.
        threshold: Least probability.
        num_unlabeled: N for FlexMatch, which makes a threshold of each class of it; None for one
            threshold for all (FixMatch).
        align: Whether predictions are aligned.
        device: Where the training steps run.
        gather: Makes [W, …] of W devices' tensors, so that all remember the same; may return the
            tensor as it is where there is one device.
        least: No class's threshold is below it.
    """

    def __init__(
        self,
        num_classes: int,
        threshold: float,
        *,
        num_unlabeled: int | None,
        align: bool,
        device: torch.device,
        gather: Callable[[Tensor], Any],
        least: float = 0.0,
    ) -> None:
        self.threshold, self._least, self._gather = threshold, least, gather
        self.alignment = Alignment(num_classes, device) if align else None
        self.curriculum = None
        if num_unlabeled is not None:
            self.curriculum = Curriculum(num_unlabeled, num_classes, device)

    def __call__(
        self, probabilities: Tensor, rows: Tensor, class_shares: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """Corrected predictions [B, K], and the threshold: one, or [K].

        Args:
            probabilities: [B, K], without gradient.
            rows: [B], places of the images among all unlabelled ones.
            class_shares: [K], class frequencies to align with.
        """
        if self.alignment is not None:
            mean = self._of_all_devices(probabilities.mean(dim=0)[None]).mean(dim=0)
            probabilities = self.alignment(probabilities, class_shares, mean)
        if self.curriculum is None:
            return probabilities, self.threshold
        thresholds = self.curriculum.thresholds(self.threshold, self._least)
        all_rows, seen = self._of_all_devices(rows), self._of_all_devices(probabilities)
        self.curriculum.update(all_rows, seen, self.threshold)
        return probabilities, thresholds

    def _of_all_devices(self, rows: Tensor) -> Tensor:
        gathered: Tensor = self._gather(rows)
        return gathered.reshape(-1, *rows.shape[1:])

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        memories = (self.curriculum, self.alignment)
        return {k: v for one in memories if one is not None for k, v in one.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; what it does not know begins anew."""
        if self.curriculum is not None and "record" in state:
            self.curriculum.load_state_dict(state)
        if self.alignment is not None and "means" in state:
            self.alignment.load_state_dict(state)
