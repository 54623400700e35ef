"""The dialogue, seen from the cloud: embed, compress, ask, select, label; each step once.

Every result lies on disk under a fingerprint of what determines it, so a second run, a resumed
one, ``test`` after ``fit`` and the other ranks read it, and the client is never asked twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecos_pl.clustering import Projection, assign, fit_pca, kmeans
from ecos_pl.embedding_bank import CHUNK_ROWS, EmbeddingBank, build_bank
from ecos_pl.encoder import Encoder, EncoderSpec, describe, public_name
from ecos_pl.images import ImageSource, to_tensor
from ecos_pl.invariance import random_view
from ecos_pl.labeling import Labeler, Labels
from ecos_pl.mailbox import Mailbox
from ecos_pl.messages import CoverageAnswer, CoverageQuery, MessageError, query_id_of
from ecos_pl.privacy import (
    PrivacyStatement,
    Release,
    calibrate_noise_multiplier,
    epsilon_of,
)
from ecos_pl.probe_result import ProbeResult
from ecos_pl.progress import progress_bar
from ecos_pl.proxy_set import ProxySet
from ecos_pl.selection import Selection, default_num_clusters, select
from ecos_pl.storage import committed_folder, fingerprint_of, write_bytes

log = logging.getLogger(__name__)

MAX_VIEWED_IMAGES = 1500
"""Images whose views are embedded at most: enough for covariances of some hundred dimensions."""

_VERSION = 1  # raise when a change below alters what is chosen


@dataclass(frozen=True)
class ProbePlan:
    """Everything about a probe that is fixed before the first question.

    Attributes:
        encoder: The public encoder.
        num_clusters: R; None for ``default_num_clusters``.
        num_dims: Principal components that the centroids live in.
        num_iters: k-means iterations at most.
        strategy: See ``selection.select``.
        size: Images in the proxy set.
        seed: Of everything the cloud draws.
        noise_std: The client's noise on each count, in images, as its policy states it.
        sample_rate: The client's sample rate, likewise.
        delta: Of the (ε, δ) statement.
        max_epsilon: The run's releases together must not cost more.
        attempt: Part of every query: another number asks anew, and is paid for again.
    """

    encoder: EncoderSpec = field(default_factory=EncoderSpec)
    num_clusters: int | None = None
    num_dims: int = 64
    num_iters: int = 25
    strategy: str = "ecos"
    size: int = 1500
    seed: int = 1
    noise_std: float = 5.0
    sample_rate: float = 1.0
    delta: float = 1e-5
    max_epsilon: float = 2.0
    attempt: int = 0


class Probe:
    """Chooses and labels a proxy set out of a pool by asking a client.

    Args:
        pool: The public images.
        plan: What is asked, and how the answer is used.
        labeler: Who labels the chosen images.
        mailbox_for: Gives the way to the client, from the probe's fingerprint.
        cache_dir: Where results are kept.
        device: Where the encoder and k-means run.
        batch_size: Images embedded at once.
        num_workers: Processes that decode images.
    """

    def __init__(
        self,
        pool: ImageSource,
        plan: ProbePlan,
        labeler: Labeler,
        mailbox_for: Callable[[str], Mailbox],
        cache_dir: Path,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        self.pool, self.plan, self.labeler, self.cache_dir = pool, plan, labeler, cache_dir
        self._device, self._batch_size, self._num_workers = device, batch_size, num_workers
        # k-means sums in float64, which Apple's GPUs lack.
        self._cluster_device = "cpu" if torch.device(device).type == "mps" else device
        self._encoder_fingerprint = plan.encoder.fingerprint()
        facts = {
            "version": _VERSION,
            "pool": pool.fingerprint,
            "encoder": self._encoder_fingerprint,
            "plan": {k: v for k, v in asdict(plan).items() if k != "encoder"},
            "labeler": {"name": labeler.name, **labeler.facts()},
        }
        self.fingerprint = fingerprint_of(facts)
        self._folder = cache_dir / "probes" / self.fingerprint[:16]
        self._mailbox_for = mailbox_for
        self._mailbox: Mailbox | None = None
        self._communication = {"bytes_down": 0, "bytes_up": 0, "round_trips": 0}
        self._seconds: dict[str, float] = {}

    def is_done(self) -> bool:
        """Whether the result is on disk already."""
        return self._folder.is_dir()

    def run(self) -> ProbeResult:
        """Read the result from disk, or do what is missing of the dialogue.

        Raises:
            ValueError: The plan cannot be kept (too small a pool, too small an ε, …); nothing was
                asked.
            MessageError: The client's answer does not fit the question.
        """
        if self.is_done():
            return ProbeResult.load(self._folder, self.fingerprint, from_disk=True)
        planned = self._planned_releases()
        with self._timed("embed"):
            bank = self._embed()
        with self._timed("cluster"):
            clusters = self._cluster(bank)
        noisy_counts, releases = None, []
        with self._timed("ask"):
            if self.plan.strategy == "ecos":
                noisy_counts, release = self._ask_for_counts(clusters)
                releases.append(release)
        with self._timed("select"):
            selection = self._select(clusters, noisy_counts)
        indices = clusters.readable[selection.indices.numpy()]
        with self._timed("label"):
            labels = self.labeler.label(
                pool=self.pool,
                indices=indices,
                embeddings=lambda: _rows_in_chunks(bank, indices),
                views=lambda num_views: self._views(bank, indices, num_views),
                encoder=self.plan.encoder,
                encoder_fingerprint=self._encoder_fingerprint,
                ask=self._ask,
                planned=planned,
                attempt=self.plan.attempt,
            )
            releases += labels.releases
            epsilon = epsilon_of(releases, self.plan.delta)
        self._commit(clusters, noisy_counts, selection, labels, epsilon)
        return ProbeResult.load(self._folder, self.fingerprint, from_disk=False)

    # --- the steps -----------------------------------------------------------------------------

    def _planned_releases(self) -> list[Release]:
        """All releases of this probe, fixed before the first question; their ε is checked."""
        plan, planned = self.plan, []
        if plan.strategy == "ecos":
            counts = Release("coverage_counts", plan.noise_std, 1.0, plan.sample_rate, True)
            alone = epsilon_of([counts], plan.delta)
            if alone > plan.max_epsilon:
                enough = calibrate_noise_multiplier(
                    plan.max_epsilon, plan.delta, sample_rate=plan.sample_rate, one_coordinate=True
                )
                raise ValueError(
                    f"privacy.max_epsilon={plan.max_epsilon:g} is less than the ε = {alone:.3f} of "
                    f"the coverage counts alone at privacy.noise_std={plan.noise_std:g}; "
                    f"noise_std={enough:.3g} would fit (and leave labels nothing)"
                )
            planned.append(counts)
        planned += self.labeler.plan(
            planned,
            max_epsilon=plan.max_epsilon,
            delta=plan.delta,
            sample_rate=plan.sample_rate,
        )
        return planned

    def _embed(self) -> EmbeddingBank:
        encoder = Encoder(self.plan.encoder).to(self._device)
        name = f"{self.pool.fingerprint[:16]}-{self._encoder_fingerprint[:16]}"
        bank = build_bank(
            self.cache_dir / "embeddings" / name,
            self.pool,
            encoder,
            image_size=self.plan.encoder.image_size,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            device=self._device,
        )
        bad = [self.pool.ids[row] for row in bank.unreadable()]
        if bad:
            shown = ", ".join(bad[:5]) + (", …" if len(bad) > 5 else "")
            log.warning("left out %d pool images that cannot be read: %s", len(bad), shown)
        return bank

    def _cluster(self, bank: EmbeddingBank) -> _Clusters:
        plan = self.plan
        readable = np.setdiff1d(np.arange(bank.num_rows), bank.unreadable())
        if len(readable) < 2:
            raise ValueError(f"the pool {self.pool.name} holds fewer than 2 readable images")
        num_clusters = plan.num_clusters or default_num_clusters(len(readable), plan.noise_std)
        if num_clusters > len(readable):
            raise ValueError(
                f"probe.num_clusters={num_clusters} exceeds the pool's {len(readable)} readable "
                "images"
            )
        facts = [_VERSION, bank.folder.name, num_clusters, plan.num_dims, plan.num_iters, plan.seed]
        folder = self.cache_dir / "clusters" / fingerprint_of(facts)[:16]
        if not folder.is_dir():
            projection = fit_pca((chunk for _, chunk in bank.chunks()), plan.num_dims).rounded()
            with committed_folder(folder) as aside:
                shape = (len(readable), len(projection.components))
                projected = np.lib.format.open_memmap(
                    aside / "projected.npy", "w+", dtype=np.float32, shape=shape
                )
                first = 0
                for _, chunk in bank.chunks():
                    rows = torch.from_numpy(np.array(chunk))
                    rows = projection(rows[~rows.isnan().any(dim=1)])
                    projected[first : first + len(rows)] = rows.numpy()
                    first += len(rows)
                projected.flush()
                with progress_bar("clustering", plan.num_iters, "iterations") as advance:
                    found = kmeans(
                        projected,
                        num_clusters,
                        num_iters=plan.num_iters,
                        seed=plan.seed,
                        device=self._cluster_device,
                        on_iteration=advance,
                    )
                    advance(plan.num_iters - found.num_iters)  # it may have converged before
                # Both parties use the centroids as they travel.
                centroids = _without_near_duplicates(found.centroids.half())
                tensors = {
                    "mean": projection.mean,
                    "components": projection.components,
                    "variances": projection.variances,
                    "centroids": centroids,
                    "assignments": assign(
                        projected, centroids.float(), device=self._cluster_device
                    ),
                }
                save_file({k: v.contiguous() for k, v in tensors.items()}, aside / "clusters.st")
                del projected
        tensors = load_file(folder / "clusters.st")
        return _Clusters(
            Projection(tensors["mean"], tensors["components"], tensors["variances"]),
            tensors["centroids"],
            tensors["assignments"],
            np.load(folder / "projected.npy", mmap_mode="r"),
            readable,
        )

    def _ask_for_counts(self, clusters: _Clusters) -> tuple[Tensor, Release]:
        query = CoverageQuery(
            encoder=public_name(self.plan.encoder),
            encoder_fingerprint=self._encoder_fingerprint,
            mean=clusters.projection.mean.half(),
            components=clusters.projection.components.half(),
            centroids=clusters.centroids,
            attempt=self.plan.attempt,
        )
        content = query.to_bytes()
        answer = CoverageAnswer.from_bytes(self._ask(content))
        counts = answer.noisy_counts
        if answer.query_id != query_id_of(content):
            raise MessageError("the client answered another question than the one asked")
        if counts.dtype != torch.int64 or counts.shape != (len(clusters.centroids),):
            raise MessageError(f"the client must answer {len(clusters.centroids)} whole numbers")
        declared = (answer.noise_std, answer.sample_rate)
        if declared != (self.plan.noise_std, self.plan.sample_rate):
            raise MessageError(
                f"the client used noise_std and sample_rate {declared}, the plan says "
                f"{(self.plan.noise_std, self.plan.sample_rate)}"
            )
        return counts, Release("coverage_counts", answer.noise_std, 1.0, answer.sample_rate, True)

    def _select(self, clusters: _Clusters, noisy_counts: Tensor | None) -> Selection:
        chosen = select(
            noisy_counts,
            clusters.assignments,
            clusters.projected,
            clusters.centroids.float(),
            size=self.plan.size,
            strategy=self.plan.strategy,
            noise_std=self.plan.noise_std,
            generator=torch.Generator().manual_seed(self.plan.seed),
        )
        size, wanted = len(chosen.indices), self.plan.size
        if self.plan.strategy != "all" and size < wanted:
            log.warning("the pool holds %d readable images, not the %d asked for", size, wanted)
        if chosen.num_filled_up:
            log.warning(
                "%d of %d images come from clusters below the threshold: the kept clusters hold no "
                "more (ask for fewer with selection.size, or lower privacy.noise_std)",
                chosen.num_filled_up,
                size,
            )
        return chosen

    def _views(
        self, bank: EmbeddingBank, indices: npt.NDArray[np.int64], num_views: int
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Embeddings [B, 1 + V, D] of chosen images and random views of each; of a sample."""
        generator = torch.Generator().manual_seed(self.plan.seed)
        sample = torch.randperm(len(indices), generator=generator)[:MAX_VIEWED_IMAGES]
        rows = np.sort(indices[sample.numpy()])
        batch = max(1, self._batch_size // num_views)
        size = self.plan.encoder.image_size
        encoder = Encoder(self.plan.encoder).to(self._device)
        with progress_bar("embedding views", len(rows), "images") as advance:
            for first in range(0, len(rows), batch):
                some = rows[first : first + batch]
                views = []
                for row in some.tolist():
                    own = torch.Generator().manual_seed(self.plan.seed + row)
                    image = to_tensor(self.pool.read(row), size)
                    views += [random_view(image, own) for _ in range(num_views)]
                embedded = encoder(torch.stack(views).to(self._device)).cpu().numpy()
                embedded = embedded.reshape(len(some), num_views, -1)
                yield np.concatenate([bank.rows(some)[:, None], embedded], axis=1)
                advance(len(some))

    def _ask(self, content: bytes) -> bytes:
        """Ask the client once; the answer is kept, and read from disk when asked again."""
        name = f"{self.fingerprint[:16]}-{query_id_of(content)}.answer"
        kept = self.cache_dir / "answers" / name
        if kept.is_file():
            answer = kept.read_bytes()
        else:
            self._mailbox = self._mailbox or self._mailbox_for(self.fingerprint)
            answer = self._mailbox.ask(content)
            write_bytes(kept, answer)
        self._communication["bytes_down"] += len(content)
        self._communication["bytes_up"] += len(answer)
        self._communication["round_trips"] += 1
        return answer

    def _commit(
        self,
        clusters: _Clusters,
        noisy_counts: Tensor | None,
        selection: Selection,
        labels: Labels,
        epsilon: float,
    ) -> None:
        plan = self.plan
        indices = clusters.readable[selection.indices.numpy()]
        chosen = torch.zeros(len(clusters.readable), dtype=torch.bool)
        chosen[selection.indices] = True
        leftover = torch.nonzero(selection.kept[clusters.assignments] & ~chosen).flatten().numpy()
        statement = asdict(PrivacyStatement(epsilon, plan.delta))
        proxy_set = ProxySet(
            ids=[self.pool.ids[index] for index in indices],
            clusters=clusters.assignments[selection.indices],
            classes=labels.classes,
            targets=labels.targets,
            weights=labels.weights,
            label_source=self.labeler.name,
            provenance={
                "pool": self.pool.name,
                "pool_fingerprint": self.pool.fingerprint,
                "encoder": describe(plan.encoder),
                "encoder_fingerprint": self._encoder_fingerprint,
                "probe_fingerprint": self.fingerprint,
                "strategy": plan.strategy,
                "seed": plan.seed,
                "privacy": statement,
            },
        )
        result = ProbeResult(
            proxy_set=proxy_set,
            indices=torch.from_numpy(indices),
            unlabeled=torch.from_numpy(clusters.readable[leftover]),
            noisy_counts=noisy_counts,
            cluster_sizes=torch.bincount(clusters.assignments, minlength=len(clusters.centroids)),
            selection=selection,
            privacy=statement,
            communication=self._communication,
            seconds=self._seconds,
            num_unreadable=len(self.pool) - len(clusters.readable),
            fingerprint=self.fingerprint,
            from_disk=False,
        )
        with committed_folder(self._folder) as aside:
            result.save(aside)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[step] = round(time.perf_counter() - start, 3)


@dataclass(frozen=True)
class _Clusters:
    projection: Projection
    centroids: Tensor  # [R, d] float16, as they travel
    assignments: Tensor  # [readable] int64
    projected: npt.NDArray[np.float32]  # [readable, d] memory map
    readable: npt.NDArray[np.int64]  # pool places


def _rows_in_chunks(
    bank: EmbeddingBank, indices: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.float32]]:
    for first in range(0, len(indices), CHUNK_ROWS):
        yield bank.rows(indices[first : first + CHUNK_ROWS])


def _without_near_duplicates(centroids: Tensor) -> Tensor:
    """Drop centroids that float16 cannot tell apart: the client's nearest one must be clear."""
    rows = centroids.numpy()
    _, first = np.unique(rows, axis=0, return_index=True)
    return centroids[torch.from_numpy(np.sort(first))]
