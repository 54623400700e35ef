"""The proxy set: which pool images were chosen, how they are labelled, where that came from."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.images import PoolPart
from ecos_pl.storage import read_json, write_bytes, write_json

UNKNOWN_LICENCE = "unknown"
"""What the manifest says of a pool whose licence nobody stated."""

_COLUMNS = ("id", "cluster", "label", "weight", "pool")


@dataclass(frozen=True)
class ProxySet:
    """Chosen pool images with (soft) labels. Row i of every field is the same image.

    Attributes:
        ids: The pool's ids.
        clusters: [n] int64.
        classes: Names of the K classes.
        targets: [n, K] float32, class probabilities; all zero where there is no label.
        weights: [n] float32 in [0, 1], how much an image's label counts; 0 without a label.
        label_source: Who labelled: ``client_prototypes``, ``public``, …
        provenance: Plain data: fingerprints, seed, strategy, ε, …; under ``pools``, see
            ``pools_of``; under ``labels``, how many answers of whom, where they came later.
        pools: Name of the pool that each image comes from, as in ``pools_of``; None if unknown.
    """

    ids: Sequence[str]
    clusters: Tensor
    classes: Sequence[str]
    targets: Tensor
    weights: Tensor
    label_source: str
    provenance: dict[str, Any]
    pools: Sequence[str] | None = None

    def __post_init__(self) -> None:
        shapes = {len(self.ids), len(self.clusters), len(self.targets), len(self.weights)}
        shapes |= {len(self.pools)} if self.pools is not None else set()
        if len(shapes) != 1 or self.targets.shape[1:] != (len(self.classes),):
            raise ValueError("the columns of a proxy set must be equally long")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("a proxy set must not hold an image twice")
        self._check_pools()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> list[str | None]:
        """Most probable class name of each image; None where there is no label."""
        best = self.targets.argmax(dim=1).tolist()
        return [
            self.classes[k] if w > 0 else None
            for k, w in zip(best, self.weights.tolist(), strict=True)
        ]

    def relabelled(
        self, targets: Tensor, weights: Tensor, label_source: str, facts: Mapping[str, Any]
    ) -> ProxySet:
        """The same images with other labels; ``facts`` about them go under ``labels``."""
        return replace(
            self,
            targets=targets,
            weights=weights,
            label_source=label_source,
            provenance={**self.provenance, "labels": dict(facts)},
        )

    def _check_pools(self) -> None:
        if self.pools is None or "pools" not in self.provenance:
            return
        expected = Counter({pool["name"]: pool["num_chosen"] for pool in self.provenance["pools"]})
        if Counter(self.pools) != expected:
            raise ValueError("the images' pools are not those of the manifest")

    def save(self, folder: Path) -> None:
        """Write ``proxy_set.csv`` (a row an image) and ``proxy_set.json`` (the rest)."""
        text = StringIO()
        # All text in quotes: before Python 3.13 a "\r" in a name would go without.
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(_header(self.classes))
        rows = zip(
            self.ids,
            self.clusters.tolist(),
            self.labels,
            self.weights.tolist(),
            self.pools or [""] * len(self),
            self.targets.tolist(),
            strict=True,
        )
        for name, cluster, label, weight, pool, target in rows:
            # Nine digits bring a float32 back exactly.
            weight, *target = (float(f"{number:.9g}") for number in (weight, *target))
            writer.writerow([name, cluster, label or "", weight, pool, *target])
        write_bytes(folder / "proxy_set.csv", text.getvalue().encode())
        about = {
            "size": len(self),
            "classes": list(self.classes),
            "label_source": self.label_source,
            "provenance": self.provenance,
        }
        write_json(folder / "proxy_set.json", about)

    @classmethod
    def load(cls, folder: Path) -> ProxySet:
        """Read what ``save`` wrote.

        Raises:
            ValueError: A file is missing, damaged, or the two do not belong together.
        """
        about = read_json(folder / "proxy_set.json")
        path = folder / "proxy_set.csv"
        try:
            with path.open(newline="", encoding="utf-8") as file:
                text = file.read()
            if not text.endswith("\n"):
                raise ValueError("its last line is cut off")
            header, *rows = list(csv.reader(StringIO(text, newline=""), strict=True))
            classes = about["classes"]
            if header != _header(classes):
                raise ValueError("its columns are not those of proxy_set.json")
            if len(rows) != about["size"]:
                raise ValueError(f"it has {len(rows)} rows, proxy_set.json says {about['size']}")
            return cls(
                ids=[row[0] for row in rows],
                clusters=torch.tensor([int(row[1]) for row in rows], dtype=torch.int64),
                classes=classes,
                targets=torch.tensor(
                    [[float(p) for p in row[len(_COLUMNS) :]] for row in rows]
                ).reshape(len(rows), len(classes)),
                weights=torch.tensor([float(row[3]) for row in rows]),
                label_source=about["label_source"],
                provenance=about["provenance"],
                pools=[row[4] for row in rows] if any(row[4] for row in rows) else None,
            )
        except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read as a proxy set: {error}") from error


def _header(classes: Sequence[str]) -> list[str]:
    return [*_COLUMNS, *(f"p({name})" for name in classes)]


def pools_of(
    parts: Sequence[PoolPart], indices: npt.NDArray[np.int64] | Sequence[int]
) -> list[dict[str, Any]]:
    """What the manifest says of the pools: one entry for each part, also those unused.

    Args:
        parts: Of the whole pool.
        indices: [n], places of the chosen images there.

    Returns:
        ``name``, ``licence`` ("unknown" where nobody stated one), ``fingerprint``,
        ``num_images`` and ``num_chosen`` of each part, in order.
    """
    chosen = Counter(pool_names(parts, indices))
    return [
        {
            "name": part.name,
            "licence": part.licence or UNKNOWN_LICENCE,
            "fingerprint": part.fingerprint,
            "num_images": part.stop - part.start,
            "num_chosen": chosen[part.name],
        }
        for part in parts
    ]


def pool_names(
    parts: Sequence[PoolPart], indices: npt.NDArray[np.int64] | Sequence[int]
) -> list[str]:
    """Name of the part that each of some images [n] comes from, for ``ProxySet.pools``."""
    stops = np.array([part.stop for part in parts], np.int64)
    numbers = np.searchsorted(stops, np.asarray(indices, np.int64), side="right")
    return [parts[number].name for number in numbers.tolist()]


def licence_summary(pools: Sequence[Mapping[str, Any]]) -> str:
    """Chosen images by licence, the most frequent first; of ``pools_of``.

    >>> licence_summary([
    ...     {"licence": "unknown", "num_chosen": 300},
    ...     {"licence": "CC-BY-4.0", "num_chosen": 1200},
    ... ])
    'CC-BY-4.0: 1,200, unknown: 300'
    """
    counts: Counter[str] = Counter()
    for pool in pools:
        counts[pool["licence"]] += pool["num_chosen"]
    return ", ".join(f"{name}: {count:,}" for name, count in counts.most_common() if count)
