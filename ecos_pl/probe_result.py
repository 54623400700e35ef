"""What a probe found, and its form on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecos_pl.accounting import PrivacyStatement, epsilon_of
from ecos_pl.label_rounds import LabelRound
from ecos_pl.messages import MessageError
from ecos_pl.pool_sample import PoolSample
from ecos_pl.privacy import Release
from ecos_pl.proxy_set import ProxySet
from ecos_pl.selection import Selection
from ecos_pl.storage import read_json, write_json


@dataclass(frozen=True)
class ProbeResult:
    """What the probe found; nothing in it is private beyond the client's noisy answers.

    Attributes:
        proxy_set: The chosen images with their labels.
        unlabeled: [m] int64, ascending pool places of images to learn from without a label: those
            of kept clusters that were not chosen, and chosen ones whose label is yet to come.
        noisy_counts: [R] int64, the client's answer; None where it was not asked.
        cluster_sizes: [R] int64, pool images per cluster.
        selection: Which rows of the pool were chosen, quotas, kept clusters and threshold.
        releases: What the client released for it.
        privacy: ``epsilon, delta, relation, unit, accountant`` of all of them together; ε is None
            where the selection read the client's images, so that none holds.
        spent_now: What of this ε was spent by this process rather than found on disk: 0 if all was
            found there.
        communication: ``bytes_down, bytes_up, round_trips``.
        seconds: Of each step, when it was done.
        num_unreadable: Pool images left out since they cannot be read.
        fingerprint: Of pool, encoder, plan and labeler.
        from_disk: Nothing was computed or asked: all was there.
        exchanges: What ``communication`` sums up: ``kind, bytes_down, bytes_up`` of each.
        pool_sample: Some of the pool's images, to be drawn; None in a result of before there was
            any.
    """

    proxy_set: ProxySet
    unlabeled: Tensor
    noisy_counts: Tensor | None
    cluster_sizes: Tensor
    selection: Selection
    releases: Sequence[Release]
    privacy: dict[str, Any]
    spent_now: float | None
    communication: dict[str, int]
    seconds: dict[str, float]
    num_unreadable: int
    fingerprint: str
    from_disk: bool
    exchanges: Sequence[dict[str, Any]] = ()
    pool_sample: PoolSample | None = None

    @property
    def indices(self) -> Tensor:
        """Places of the chosen images in the pool, [n] int64 in the order of ``proxy_set``."""
        return self.selection.indices

    @property
    def statement(self) -> PrivacyStatement:
        """The privacy loss as a sentence."""
        return PrivacyStatement(**self.privacy)

    def relabelled(
        self,
        targets: Tensor,
        weights: Tensor,
        label_source: str,
        *,
        unlabelled: Tensor,
        facts: Mapping[str, Any],
    ) -> ProbeResult:
        """The same selection with other labels.

        Args:
            targets: [n, K], see `ProxySet`.
            weights: [n].
            label_source: Who labelled.
            unlabelled: [n] bool, images of which nobody said anything; they join ``unlabeled``.
            facts: Plain data about the labels, for the manifest.
        """
        return replace(
            self,
            proxy_set=self.proxy_set.relabelled(targets, weights, label_source, facts),
            unlabeled=torch.cat([self.unlabeled, self.indices[unlabelled]]).sort().values,
        )

    def with_round(self, found: LabelRound) -> ProbeResult:
        """The same selection with the labels of a further round, and what it cost.

        Raises:
            MessageError: The client protected another unit in this round than before.
        """
        if self.releases:
            same = unit_text(found.max_per_unit) == self.statement.unit
            if not same:
                raise MessageError(_DIFFERENT_UNITS)
        releases = [*self.releases, *found.releases]
        delta = self.privacy["delta"]
        epsilon, spent_now = None, None
        if self.privacy["epsilon"] is not None:
            epsilon = epsilon_of(releases, delta)
            spent_now = epsilon - self.privacy["epsilon"] + (self.spent_now or 0.0)
        if found.from_disk:
            spent_now = self.spent_now
        return replace(
            self,
            proxy_set=replace(self.proxy_set, targets=found.targets, weights=found.weights),
            releases=releases,
            privacy=asdict(PrivacyStatement(epsilon, delta, unit=unit_text(found.max_per_unit))),
            spent_now=spent_now,
            communication={
                name: size + found.traffic[name] for name, size in self.communication.items()
            },
            exchanges=[*self.exchanges, *found.exchanges],
        )

    def save(self, folder: Path) -> None:
        """Write everything into a folder: the proxy set, ``probe.st`` and ``probe.json``."""
        self.proxy_set.save(folder)
        tensors = {
            "unlabeled": self.unlabeled,
            "cluster_sizes": self.cluster_sizes,
            "selected": _compact(self.selection.indices),
            "quotas": self.selection.quotas,
            "kept": self.selection.kept,
        }
        if self.noisy_counts is not None:
            tensors["noisy_counts"] = self.noisy_counts
        if self.pool_sample is not None:
            tensors |= self.pool_sample.tensors()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "probe.st")
        about = {
            "privacy": self.privacy,
            "releases": [asdict(release) for release in self.releases],
            "communication": self.communication,
            "exchanges": list(self.exchanges),
            "seconds": self.seconds,
            "threshold": self.selection.threshold,
            "num_filled_up": self.selection.num_filled_up,
            "num_duplicates": self.selection.num_duplicates,
            "num_unreadable": self.num_unreadable,
            "fingerprint": self.fingerprint,
        }
        write_json(folder / "probe.json", about)

    @classmethod
    def load(cls, folder: Path, fingerprint: str, *, from_disk: bool) -> ProbeResult:
        """Read what ``save`` wrote.

        Raises:
            ValueError: The folder holds another probe's result, or a damaged one.
        """
        about = read_json(folder / "probe.json")
        if about["fingerprint"] != fingerprint:
            raise ValueError(f"{folder} belongs to another probe; remove it")
        tensors = load_file(folder / "probe.st")
        return cls(
            proxy_set=ProxySet.load(folder),
            unlabeled=tensors["unlabeled"],
            noisy_counts=tensors.get("noisy_counts"),
            cluster_sizes=tensors["cluster_sizes"],
            selection=Selection(
                tensors["selected"].long(),
                tensors["quotas"],
                tensors["kept"],
                about["threshold"],
                about["num_filled_up"],
                about["num_duplicates"],
            ),
            releases=[Release(**release) for release in about["releases"]],
            privacy=about["privacy"],
            spent_now=0.0 if from_disk else about["privacy"]["epsilon"],
            communication=about["communication"],
            seconds=about["seconds"],
            num_unreadable=about["num_unreadable"],
            fingerprint=fingerprint,
            from_disk=from_disk,
            exchanges=about.get("exchanges", ()),
            pool_sample=PoolSample.from_tensors(tensors),
        )


_DIFFERENT_UNITS = "the client's answers protect different units (max_per_unit differs)"


def unit_of(declared: Sequence[int]) -> str:
    """Who counts as one, from what the answers declare (`messages.Answer.max_per_unit`).

    Raises:
        MessageError: They differ.
    """
    if len(set(declared)) > 1:
        raise MessageError(_DIFFERENT_UNITS)
    return unit_text(max(declared, default=1))


def unit_text(max_per_unit: int) -> str:
    """In the words of the privacy statement.

    >>> unit_text(1), unit_text(3)
    ('sample', 'person (of at most 3 samples)')
    """
    if max_per_unit == 1:
        return "sample"
    return f"person (of at most {max_per_unit} samples)"


def _compact(places: Tensor) -> Tensor:
    """In half the bytes, where the pool is small enough for it."""
    fits = not len(places) or int(places.max()) < 2**31
    return places.int() if fits else places
