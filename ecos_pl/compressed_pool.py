"""The pool, compressed: its embeddings in few dimensions, clustered; every rank does a share.

What is made lies on disk under a fingerprint of what determines it: ``projected/`` holds the
projection and the projected rows in chunks, ``clusters/`` the centroids and assignments. A run that
is stopped goes on at the last whole chunk, whatever its number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ecos_pl.embedding_bank import EmbeddingBank
from ecos_pl.kmeans import kmeans
from ecos_pl.once import in_turn
from ecos_pl.progress import progress_bar
from ecos_pl.projection import Projection, fit_pca
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.row_blocks import Rows
from ecos_pl.storage import committed_folder, fingerprint_of, write_bytes

PROJECTED_CHUNK_ROWS = 65_536
"""Rows of a projected chunk: 8 MB in 64 dimensions."""

_READ_ROWS = 8192  # embeddings projected at once
_VERSION = 1  # raise when a change below alters centroids or assignments


@dataclass(frozen=True)
class CompressedPool:
    """The pool as k-means sees it.

    Attributes:
        projection: From the encoder's D dimensions to d, rounded to float16 as it travels.
        projected: [N, d] float16; NaN rows for unreadable images.
        centroids: [R, d] float16, as they travel; all different.
        assignments: [N] int32 memory map: nearest centroid of each row, -1 for unreadable images.
    """

    projection: Projection
    projected: EmbeddingBank
    centroids: Tensor
    assignments: npt.NDArray[np.int32]

    def cluster_sizes(self) -> Tensor:
        """Readable pool images of each cluster, [R] int64."""
        sizes = np.zeros(len(self.centroids) + 1, np.int64)
        for first in range(0, len(self.assignments), 1 << 20):
            part = self.assignments[first : first + (1 << 20)]
            sizes += np.bincount(part + 1, minlength=len(sizes))
        return torch.from_numpy(sizes[1:])


def compress_pool(
    embeddings: Rows,
    key: str,
    cache_dir: Path,
    *,
    num_clusters: int,
    num_dims: int,
    num_iters: int,
    num_restarts: int,
    seed: int,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> CompressedPool:
    """Find principal components and centroids, or read them from disk.

    Args:
        embeddings: [N, D] float16, NaN rows for unreadable images.
        key: Names these embeddings: part of the names of what is made of them.
        cache_dir: On a disk that all ranks see.
        num_clusters: ``R``; fewer come back where centroids are equal in float16.
        num_dims: ``d`` at most.
        num_iters: k-means iterations at most.
        num_restarts: k-means starts, of which the best counts.
        seed: Of the starts.
        device: Where principal components and k-means are computed.
        ranks: Who shares the work.

    Raises:
        ValueError: Fewer readable images than clusters.
    """
    name = fingerprint_of([_VERSION, key, num_dims])[:16]
    folder = cache_dir / "projected" / name
    with in_turn(folder, "another run projects the pool", ranks):
        projection, projected = _project(embeddings, num_dims, folder, device, ranks)
    facts = [name, num_clusters, num_iters, num_restarts, seed]
    folder = cache_dir / "clusters" / fingerprint_of(facts)[:16]
    with in_turn(folder, "another run clusters the pool", ranks):
        if not ranks.broadcast(folder.is_dir()):
            title = "clustering" if ranks.is_first else None
            with progress_bar(title, num_iters, "iterations") as advance:
                found = kmeans(
                    projected,
                    num_clusters,
                    num_iters=num_iters,
                    num_restarts=num_restarts,
                    seed=seed,
                    centroid_dtype=torch.float16,
                    device=device,
                    ranks=ranks,
                    on_iteration=advance,
                )
            if ranks.is_first:
                with committed_folder(folder) as aside:
                    write_bytes(aside / "centroids.st", save({"centroids": found.centroids.half()}))
                    np.save(aside / "assignments.npy", found.assignments.numpy().astype(np.int32))
            ranks.barrier()
    centroids = load_file(folder / "centroids.st")["centroids"]
    assignments = np.load(folder / "assignments.npy", mmap_mode="c")
    return CompressedPool(projection, projected, centroids, assignments)


def _project(
    embeddings: Rows,
    num_dims: int,
    folder: Path,
    device: torch.device | str,
    ranks: Ranks,
) -> tuple[Projection, EmbeddingBank]:
    """Principal components [d, D], and the rows [N, d] in them."""
    path = folder / "projection.st"
    if not ranks.broadcast(path.is_file()):
        found = fit_pca(embeddings, num_dims, device=device, ranks=ranks).rounded()
        if ranks.is_first:
            parts = {"mean": found.mean, "components": found.components}
            parts["variances"] = found.variances
            write_bytes(path, save({name: part.contiguous() for name, part in parts.items()}))
        ranks.barrier()
    tensors = load_file(path)
    projection = Projection(tensors["mean"], tensors["components"], tensors["variances"])
    num_dims = len(projection.components)
    bank = EmbeddingBank(folder, len(embeddings), num_dims, chunk_rows=PROJECTED_CHUNK_ROWS)
    todo = ranks.share(bank.missing_chunks(ranks))
    num_rows = sum(len(bank.rows_of(chunk)) for chunk in todo)
    title = "projecting the pool" if ranks.is_first and num_rows > PROJECTED_CHUNK_ROWS else None
    with progress_bar(title, num_rows, "images") as advance:
        for chunk in todo:
            rows = bank.rows_of(chunk)
            content = np.empty((len(rows), num_dims), np.float16)
            for first in range(0, len(rows), _READ_ROWS):
                part = rows[first : first + _READ_ROWS]
                some = torch.from_numpy(np.array(embeddings[part.start : part.stop]))
                content[first : first + len(part)] = projection(some).half().numpy()
                advance(len(part))
            bank.write_chunk(chunk, content)
    bank.finish(ranks)
    return projection, bank
