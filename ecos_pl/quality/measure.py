"""All measures of a proxy set, each beside that of a random set of the same size.

Two groups: ``quality`` needs the public pool alone; ``simulation`` needs the client's test images
or the pool's true classes and domains, which only a benchmark has. None is NaN: what is unknown is
None.

Shapes: N pool rows, D encoder and d projected dimensions, S rows of the set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.compressed_pool import CompressedPool
from ecos_pl.images import ImageSource
from ecos_pl.quality.composition import ClassCoverage, NormalizedEntropy, Share
from ecos_pl.quality.kernel_distance import KernelDistance
from ecos_pl.quality.manifold import NUM_NEIGHBORS, Manifold
from ecos_pl.quality.near_duplicate_rate import NearDuplicateRate
from ecos_pl.quality.objective import NearestDistance
from ecos_pl.row_blocks import Rows
from ecos_pl.row_reading import read_scattered
from ecos_pl.storage import fingerprint_of

PUBLIC = (
    *("near_duplicate_rate", "cluster_coverage", "cluster_entropy"),
    *("pool_distance", "pool_radius"),
)
OF_COMPOSITION = ("purity", "class_share", "class_coverage", "class_coverage_10", "class_entropy")
SIMULATED = (
    *OF_COMPOSITION,
    *("client_distance", "joint_radius", "kernel_distance"),
    *("precision", "recall", "density", "coverage"),
)

CHUNK_ROWS = 2048
"""Rows of a set that are in memory at once."""

MAX_SET_IMAGES = 4096
"""Images of a set in kernel distance and manifold; of more, a random sample."""

POOL_DISTANCES = 2**28
"""Distances between pool and set at most: of a larger pool, the radius is that of a sample."""

MAX_POOL_IMAGES, MIN_POOL_IMAGES = 2**17, 2**11

DUPLICATE_DISTANCES = 2**26
"""The same inside a set for near-duplicates, but for `MIN_DUPLICATE_IMAGES` images at least."""

MIN_DUPLICATE_IMAGES = 512

_ALONE: dict[str, Any] = {"sync_on_compute": False}
"""One rank measures while the others wait elsewhere: asking them for their part would never end."""

Indices = npt.NDArray[np.int64]
Values = dict[str, float | None]
Table = dict[str, dict[str, float | None]]
"""``{NAME: {"proxy_set": value, "random": value}}``."""


@dataclass(frozen=True)
class Truth:
    """What a benchmark knows of the client and the pool.

    Attributes:
        pool: With true classes and domains, where it knows them.
        classes: The client's.
        domain: The pool's name for the client's domain, if it has one.
        client: [n, D] embeddings of the client's test images; None where there are none.
    """

    pool: ImageSource
    classes: Sequence[str]
    domain: str | None
    client: Tensor | None


@dataclass(frozen=True)
class ProxyMeasures:
    """Measures proxy sets of one pool.

    Attributes:
        embeddings: [N, D] unit rows, the pool's.
        compressed: The same in d dimensions, and clustered.
        duplicate_distance: Of near-duplicates; 0: nobody says what one is.
        seed: Of the random set and of samples.
        device: Where distances are computed.
    """

    embeddings: Rows
    compressed: CompressedPool
    duplicate_distance: float
    seed: int
    device: torch.device | str = "cpu"

    def against_random(self, chosen: Indices, truth: Truth | None) -> tuple[Table, Table]:
        """Measure the chosen rows [S] of the pool and as many random ones.

        Args:
            chosen: Their places.
            truth: None where the client is not simulated.

        Returns:
            The public measures and the simulated ones.
        """
        sets = {"proxy_set": np.sort(chosen), "random": self.random_set(len(chosen))}
        public: Table = {name: {} for name in PUBLIC}
        simulated: Table = {name: dict.fromkeys(sets) for name in SIMULATED}
        points = self._pool_sample(len(chosen))
        for which, rows in sets.items():
            to_pool = NearestDistance(points, **_ALONE)
            for some in self._chunks(self.compressed.projected, rows):
                to_pool.update(some)
            for name, value in self._public(rows, to_pool).items():
                public[name][which] = value
            if truth is not None:
                for name, value in self._simulated(rows, to_pool, truth).items():
                    simulated[name][which] = value
        return public, simulated

    def random_set(self, size: int) -> Indices:
        """Rows [size] drawn from the readable ones, ascending; of a stream of its own."""
        readable = np.flatnonzero(self.compressed.assignments >= 0)
        return self._sample(readable, size, "set")

    # --- the two groups ------------------------------------------------------------------------

    def _public(self, rows: Indices, to_pool: NearestDistance) -> Values:
        num_clusters = len(self.compressed.centroids)
        clusters = torch.from_numpy(self.compressed.assignments[rows].astype(np.int64))
        covered = ClassCoverage(num_clusters, **_ALONE)
        entropy = NormalizedEntropy(num_clusters, **_ALONE)
        covered.update(clusters)
        entropy.update(clusters)
        distances = to_pool.compute()
        return {
            "near_duplicate_rate": self._near_duplicate_rate(rows),
            "cluster_coverage": _number(covered.compute()),
            "cluster_entropy": _number(entropy.compute()),
            "pool_distance": _number(distances["mean"]),
            "pool_radius": _number(distances["max"]),
        }

    def _simulated(self, rows: Indices, to_pool: NearestDistance, truth: Truth) -> Values:
        values = composition(truth, rows)
        if truth.client is None or not len(truth.client):
            return values
        client = truth.client.to(self.device)
        to_pool.update(self.compressed.projection(client.cpu()))
        to_client = NearestDistance(client, **_ALONE)
        for some in self._chunks(self.embeddings, rows):
            to_client.update(some)
        values["client_distance"] = _number(to_client.compute()["mean"])
        values["joint_radius"] = _number(to_pool.compute()["max"])
        sample = self._read(self.embeddings, self._sample(rows, MAX_SET_IMAGES, "images"))
        if min(len(sample), len(client)) > NUM_NEIGHBORS:
            kernel = KernelDistance(seed=self.seed, **_ALONE)
            manifold = Manifold(**_ALONE)
            for metric in (kernel, manifold):
                metric.update(sample, client=False)
                metric.update(client, client=True)
            values["kernel_distance"] = _number(kernel.compute())
            values |= {name: _number(value) for name, value in manifold.compute().items()}
        return values

    def _near_duplicate_rate(self, rows: Indices) -> float | None:
        if self.duplicate_distance == 0:
            return None
        number = max(MIN_DUPLICATE_IMAGES, DUPLICATE_DISTANCES // max(1, len(rows)))
        asked = self._sample(rows, number, "duplicates")
        rate = NearDuplicateRate(
            self._read(self.embeddings, asked),
            torch.from_numpy(asked),
            self.duplicate_distance,
            **_ALONE,
        )
        for first in range(0, len(rows), CHUNK_ROWS):
            some = rows[first : first + CHUNK_ROWS]
            rate.update(self._read(self.embeddings, some), torch.from_numpy(some))
        return _number(rate.compute())

    # --- rows ----------------------------------------------------------------------------------

    def _pool_sample(self, size: int) -> Tensor:
        """Projected rows of the pool that distances are measured from: all of them, if few."""
        number = min(MAX_POOL_IMAGES, max(MIN_POOL_IMAGES, POOL_DISTANCES // max(1, size)))
        readable = np.flatnonzero(self.compressed.assignments >= 0)
        return self._read(self.compressed.projected, self._sample(readable, number, "pool"))

    def _chunks(self, table: Rows, rows: Indices) -> Iterator[Tensor]:
        for first in range(0, len(rows), CHUNK_ROWS):
            yield self._read(table, rows[first : first + CHUNK_ROWS])

    def _read(self, table: Rows, rows: Indices) -> Tensor:
        return read_scattered(table, rows).to(self.device).float()

    def _sample(self, rows: Indices, number: int, purpose: str) -> Indices:
        if len(rows) <= number:
            return rows
        # Not the stream of the strategy `random`, which would draw the very same images.
        own = int(fingerprint_of(["quality", purpose, self.seed])[:15], 16)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(own))
        return np.sort(rows[order[:number].numpy()])


def composition(truth: Truth, rows: Indices) -> Values:
    """Shares of the client's domain and classes among pool images [S], and how even they are.

    None where the pool knows no domain, or no class of these images.
    """
    values: Values = dict.fromkeys(OF_COMPOSITION)
    places = rows.tolist()
    if truth.domain is not None:
        purity = Share(**_ALONE)
        purity.update(torch.tensor([truth.pool.domains[row] == truth.domain for row in places]))
        values["purity"] = _number(purity.compute())
    labels = [truth.pool.labels[row] for row in places]
    if all(label is None for label in labels):
        return values
    number = {name: k for k, name in enumerate(truth.classes)}
    numbers = torch.tensor([-1 if label is None else number.get(label, -1) for label in labels])
    num_classes = len(truth.classes)
    metrics = {
        "class_coverage": ClassCoverage(num_classes, **_ALONE),
        # A tenth of what each class would have if all had the same.
        "class_coverage_10": ClassCoverage(
            num_classes, max(1, len(rows) // (10 * num_classes)), **_ALONE
        ),
        "class_entropy": NormalizedEntropy(num_classes, **_ALONE),
    }
    for name, metric in metrics.items():
        metric.update(numbers)
        values[name] = _number(metric.compute())
    share = Share(**_ALONE)
    share.update(numbers >= 0)
    values["class_share"] = _number(share.compute())
    return values


def _number(value: Tensor) -> float | None:
    """Six digits of it; None if it is not finite."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
