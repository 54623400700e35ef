"""Asking for labels once more, in the space of a backbone that has learned from the first ones.

Training on the first labels adapts the backbone to the client's classes. In its space an equally
noisy release says more. How many rounds there will be, and their noise, is fixed before the first
question, so that all releases are accounted for together (`PrototypeLabeler.plan`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ecos_pl.privacy import Release
from ecos_pl.storage import write_bytes


@dataclass(frozen=True)
class LabelRound:
    """What one further round came to.

    Attributes:
        number: 1 for the first round after the probe's own release.
        targets: [n, K] float32, the proxy set's new class probabilities.
        weights: [n] float32.
        releases: What the client released for them.
        max_per_unit: Samples of one unit of privacy, as the client declared it.
        traffic: ``bytes_down, bytes_up, round_trips``, the backbone included.
        changed: Share of the images whose most probable class is another one now.
        from_disk: Nothing was asked: it was there.
        exchanges: What ``traffic`` sums up: ``kind, bytes_down, bytes_up`` of each.
    """

    number: int
    targets: Tensor
    weights: Tensor
    releases: Sequence[Release]
    max_per_unit: int
    traffic: dict[str, int]
    changed: float
    from_disk: bool = False
    exchanges: Sequence[dict[str, Any]] = ()

    def save(self, path: Path) -> None:
        """Write it, atomically: safetensors with a JSON header."""
        about = {
            "number": self.number,
            "releases": [asdict(release) for release in self.releases],
            "max_per_unit": self.max_per_unit,
            "traffic": self.traffic,
            "changed": self.changed,
            "exchanges": list(self.exchanges),
        }
        tensors = {"targets": self.targets.contiguous(), "weights": self.weights.contiguous()}
        write_bytes(path, save(tensors, {"label_round": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> LabelRound:
        """Read what ``save`` wrote.

        Raises:
            ValueError: It is damaged; the text is one line.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})["label_round"])
                targets, weights = file.get_tensor("targets"), file.get_tensor("weights")
            releases = [Release(**release) for release in about.pop("releases")]
            return cls(targets=targets, weights=weights, releases=releases, from_disk=True, **about)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read as a round of labels: {reason}") from error


def pooled(earlier: Tensor, new: Tensor, number: int) -> Tensor:
    """Class probabilities [n, K] from those of all rounds: their normalised geometric mean.

    A logarithmic opinion pool (Genest & Zidek 1986, §3) in which every round counts the same.
    Each release has noise of its own, so that together they are more often right; but all see the
    same images, so that a product of probabilities would be far too sure. On mixed_digits at ε = 1
    (one run): 0.945 and 0.944 of the labels right alone, 0.956 together, at a mean confidence of
    0.970; the product would claim 0.985.

    Args:
        earlier: [n, K], pooled from the rounds before.
        new: [n, K], of this round.
        number: How many rounds there were before.

    >>> import torch
    >>> pooled(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]]), 1)
    tensor([[0.7500, 0.2500]])
    """
    logs = number * earlier.clamp_min(_LEAST).log() + new.clamp_min(_LEAST).log()
    return (logs / (number + 1)).softmax(dim=1)


_LEAST = 1e-4
"""Least probability that one round can give a class: it must not rule out what the others say."""


def share_changed(old: Tensor, new: Tensor) -> float:
    """Share of rows whose most probable class differs.

    >>> import torch
    >>> share_changed(torch.eye(2), torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
    0.5
    """
    return float((old.argmax(dim=1) != new.argmax(dim=1)).float().mean())
