"""The proxy set: which pool images were chosen, how they are labelled, where that came from."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecos_pl.storage import read_json, write_bytes, write_json

_COLUMNS = ("id", "cluster", "label", "weight")


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
        provenance: Plain data: fingerprints, seed, strategy, ε, …
    """

    ids: Sequence[str]
    clusters: Tensor
    classes: Sequence[str]
    targets: Tensor
    weights: Tensor
    label_source: str
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        shapes = {len(self.ids), len(self.clusters), len(self.targets), len(self.weights)}
        if len(shapes) != 1 or self.targets.shape[1:] != (len(self.classes),):
            raise ValueError("the columns of a proxy set must be equally long")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("a proxy set must not hold an image twice")

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

    def save(self, folder: Path) -> None:
        """Write ``proxy_set.csv`` (a row an image) and ``proxy_set.json`` (the rest)."""
        text = StringIO()
        # All text in quotes: before Python 3.13 a "\r" in a name would go without.
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow([*_COLUMNS, *(f"p({name})" for name in self.classes)])
        rows = zip(
            self.ids,
            self.clusters.tolist(),
            self.labels,
            self.weights.tolist(),
            self.targets.tolist(),
            strict=True,
        )
        for name, cluster, label, weight, target in rows:
            # Nine digits bring a float32 back exactly.
            numbers = [float(f"{number:.9g}") for number in (weight, *target)]
            writer.writerow([name, cluster, label or "", *numbers])
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
            if header != [*_COLUMNS, *(f"p({name})" for name in classes)]:
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
            )
        except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read as a proxy set: {error}") from error
