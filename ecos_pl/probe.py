"""The dialogue, seen from the cloud: embed, compress, ask, select, label; each step once.

Every result lies on disk under a fingerprint of what determines it, so a second run, a resumed
one, ``test`` after ``fit`` and the other ranks read it, and the client is never asked twice.
Embedding and compressing are shared out over ranks; one of them, the first, asks and chooses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.accounting import PrivacyStatement, calibrate_noise_multiplier, epsilon_of
from ecos_pl.answer_checks import check_answer, check_integers, check_noise
from ecos_pl.chosen_embeddings import ChosenEmbeddings, ImageEmbedder, embed_chosen
from ecos_pl.compressed_pool import CompressedPool, compress_pool
from ecos_pl.conversation import Conversation
from ecos_pl.coverage import coverage_release
from ecos_pl.encoder import EncoderSpec, describe, public_name
from ecos_pl.images import PoolSource
from ecos_pl.label_rounds import LabelRound, pooled, share_changed
from ecos_pl.labeling import Labeler, LabelingTask, Labels
from ecos_pl.mailbox import Mailbox
from ecos_pl.messages import CoverageAnswer, CoverageQuery
from ecos_pl.near_duplicates import DUPLICATE_DISTANCE
from ecos_pl.pool_embeddings import PoolEmbeddings, embed_pool, given_facts, pool_embeddings
from ecos_pl.pool_sample import sample_pool
from ecos_pl.privacy import Release
from ecos_pl.probe_result import ProbeResult, unit_of
from ecos_pl.proxy_set import ProxySet, pool_names, pools_of
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.revealed_client import RevealedClient
from ecos_pl.selection import NOT_PRIVATE, Selection, default_num_clusters, select
from ecos_pl.storage import committed_folder, fingerprint_of

log = logging.getLogger(__name__)

_VERSION = 4  # raise when a change below alters what is chosen


@dataclass(frozen=True)
class ProbePlan:
    """Everything about a probe that is fixed before the first question.

    Attributes:
        encoder: The public encoder.
        num_clusters: R; None for ``default_num_clusters``.
        num_dims: Principal components that the centroids live in.
        num_iters: k-means iterations at most.
        num_restarts: k-means starts, of which the best counts.
        strategy: See ``selection.select``.
        oracle_domain: The client's domain in the pool, for the strategy ``oracle``.
        size: Images in the proxy set.
        candidates_per_pick: See ``selection.select``.
        duplicate_distance: Chosen images whose embeddings lie closer are near-duplicates.
        seed: Of everything the cloud draws.
        noise_std: Noise asked for on each count, in images; the client's policy may want more, and
            then refuses.
        sample_rate: Chance asked for with which each image takes part.
        delta: Of the (ε, δ) statement.
        max_epsilon: The run's releases together must not cost more.
        attempt: Part of every query: another number asks anew, and is paid for again.
    """

    encoder: EncoderSpec = field(default_factory=EncoderSpec)
    num_clusters: int | None = None
    num_dims: int = 64
    num_iters: int = 25
    num_restarts: int = 1
    strategy: str = "ecos"
    oracle_domain: str | None = None
    size: int = 1500
    candidates_per_pick: float | None = None
    duplicate_distance: float = DUPLICATE_DISTANCE
    seed: int = 1
    noise_std: float = 5.0
    sample_rate: float = 1.0
    delta: float = 1e-5
    max_epsilon: float = 2.0
    attempt: int = 0


def _facts(plan: ProbePlan) -> dict[str, Any]:
    """What of the plan goes into the fingerprint, beside the encoder's own."""
    facts = {key: value for key, value in asdict(plan).items() if key != "encoder"}
    if plan.candidates_per_pick is None:  # as probes made before there was a choice
        del facts["candidates_per_pick"]
    return facts


class Probe:
    """Chooses and labels a proxy set out of a pool by asking a client.

    Args:
        pool: The public images.
        plan: What is asked, and how the answer is used.
        labeler: Who labels the chosen images.
        mailbox_for: Gives the way to the client, from the probe's fingerprint.
        client_id: What tells this client from others who could be asked about the same pool.
        cache_dir: Where results are kept; on a disk that all ranks see.
        revealed: The client's images, for a strategy that is not private; None for a real client.
        given_embeddings: Files of embeddings made elsewhere, by name of the pool's part.
        device: Where the encoder and k-means run.
        batch_size: Images embedded at once.
        num_workers: Processes that decode images.

    Raises:
        ValueError: The strategy reads the client's images, and they are not revealed.
    """

    def __init__(
        self,
        pool: PoolSource,
        plan: ProbePlan,
        labeler: Labeler,
        mailbox_for: Callable[[str], Mailbox],
        cache_dir: Path,
        *,
        client_id: str,
        revealed: RevealedClient | None = None,
        given_embeddings: Mapping[str, Path] | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        self.pool, self.plan, self.labeler, self.cache_dir = pool, plan, labeler, cache_dir
        self._embedder = ImageEmbedder(cache_dir, batch_size, num_workers, device)
        # k-means sums in float64, which Apple's GPUs lack.
        self._cluster_device = "cpu" if torch.device(device).type == "mps" else device
        self._given = dict(given_embeddings or {})
        self._encoder_fingerprint = plan.encoder.fingerprint()
        facts: dict[str, Any] = {
            "version": _VERSION,
            "pool": pool.fingerprint,
            "embeddings": given_facts(self._given),
            "client": client_id,
            "encoder": self._encoder_fingerprint,
            "plan": _facts(plan),
            "labeler": {"name": labeler.name, **labeler.facts()},
        }
        self._revealed = None
        if plan.strategy in NOT_PRIVATE:
            if revealed is None:
                raise ValueError(
                    f"selection.strategy={plan.strategy} reads the client's images: it is for "
                    "simulations alone (client=simulated)"
                )
            self._revealed = revealed
            facts["client_images"] = revealed.source.fingerprint
        self.fingerprint = fingerprint_of(facts)
        self._folder = cache_dir / "probes" / self.fingerprint[:16]
        self._conversation = Conversation(cache_dir, self.fingerprint, mailbox_for)
        self._seconds: dict[str, float] = {}

    def is_done(self) -> bool:
        """Whether the result is on disk already."""
        return self._folder.is_dir()

    def run(self, ranks: Ranks = ALONE) -> ProbeResult:
        """Read the result from disk, or do what is missing of the dialogue.

        Args:
            ranks: Who shares the work; all of them call this.

        Raises:
            ValueError: The plan cannot be kept (too small a pool, too small an ε, …); nothing was
                asked.
            MessageError: The client's answer does not fit the question.
            RankError: Another rank failed.
        """
        if ranks.broadcast(self.is_done()):
            return ProbeResult.load(self._folder, self.fingerprint, from_disk=True)
        planned = self._planned_for_labels()
        with self._timed("embed"):
            bank = self._embed(ranks)
        with self._timed("cluster"):
            compressed = self._compress(bank, ranks)
        counts, client, selection = None, None, None
        with ranks.first() as is_first:
            if is_first:
                with self._timed("ask"):
                    if self.plan.strategy == "ecos":
                        counts = self._ask_for_counts(compressed)
                    elif self._revealed is not None:
                        shown = self._revealed.embeddings(self.fingerprint, self.plan.encoder)
                        client = compressed.projection(shown)
                with self._timed("select"):
                    selection = self._select(bank, compressed, counts, client)
        indices = ranks.broadcast(selection.indices.numpy() if selection else None)
        with self._timed("label"):
            chosen = embed_chosen(
                self.pool,
                indices,
                replace(self.plan.encoder, features=self.labeler.features),
                pool_encoder=self.plan.encoder,
                pool_bank=bank,
                embedder=self._embedder,
                seed=self.plan.seed,
                ranks=ranks,
            )
        with ranks.first() as is_first:
            if is_first:
                assert selection is not None
                with self._timed("label"):
                    labels = self._label(chosen, planned)
                self._commit(bank, compressed, counts, selection, labels)
        return ProbeResult.load(self._folder, self.fingerprint, from_disk=False)

    def pool_on_disk(self) -> tuple[PoolEmbeddings, CompressedPool] | None:
        """The pool's embeddings and clusters as the probe left them, for one rank to look at.

        None where the embeddings have been removed since: only a probe makes them anew.
        """
        bank = pool_embeddings(self.pool, self.plan.encoder, self.cache_dir, self._given)
        return None if bank is None else (bank, self._compress(bank, ALONE))

    def ask_again(
        self,
        result: ProbeResult,
        number: int,
        backbone: Path,
        *,
        image_size: int,
        ranks: Ranks = ALONE,
    ) -> LabelRound:
        """One further round of labels, in the space of an adapted backbone.

        Args:
            result: What the probe found, with the labels so far.
            number: Of the round, from 1; its release was planned before the first question.
            backbone: The adapted backbone's file (`backbone_file`), the same on all ranks.
            image_size: Side in pixels of the images that it was adapted on.
            ranks: Who shares the embedding; all of them call this.

        Raises:
            MessageError: The client refuses, or its answer does not fit the question.
            RankError: Another rank failed.
        """
        rounds = self.labeler.rounds
        assert rounds is not None, "rounds are planned before the first question"
        adapted = replace(
            self.plan.encoder,
            weights=str(backbone),
            image_size=image_size,
            features=rounds.features,
            adapted=True,
        )
        chosen = embed_chosen(
            self.pool,
            result.indices.numpy(),
            adapted,
            pool_encoder=self.plan.encoder,
            pool_bank=None,
            embedder=self._embedder,
            seed=self.plan.seed,
            ranks=ranks,
        )
        found: LabelRound | None = None
        with ranks.first() as is_first:
            if is_first:
                traffic_before = dict(self._conversation.traffic)
                num_before = len(self._conversation.exchanges)
                self._conversation.send_model(backbone.read_bytes())
                labels = self._label(chosen, self._planned_for_labels(), number)
                traffic = self._conversation.traffic
                earlier = result.proxy_set.targets
                targets = pooled(earlier, labels.targets, number)
                found = LabelRound(
                    number,
                    targets,
                    labels.weights,
                    labels.releases,
                    labels.max_per_unit,
                    {name: traffic[name] - traffic_before[name] for name in traffic},
                    share_changed(earlier, targets),
                    exchanges=self._conversation.exchanges[num_before:],
                )
        return ranks.broadcast(found)

    # --- the steps -----------------------------------------------------------------------------

    def _planned_for_labels(self) -> list[Release]:
        """The labels' releases; all are fixed, and their ε checked, before the first question.

        ε is per unit of privacy, whatever the client takes as one: noise follows sensitivity.
        """
        plan, counts = self.plan, []
        if plan.strategy == "ecos":
            counts = [coverage_release(plan.noise_std, plan.sample_rate)]
            alone = epsilon_of(counts, plan.delta)
            if alone > plan.max_epsilon:
                enough = calibrate_noise_multiplier(
                    plan.max_epsilon, plan.delta, sample_rate=plan.sample_rate, one_coordinate=True
                )
                raise ValueError(
                    f"privacy.max_epsilon={plan.max_epsilon:g} is less than the ε = {alone:.3f} of "
                    f"the coverage counts alone at privacy.noise_std={plan.noise_std:g}; "
                    f"noise_std={enough:.3g} would fit (and leave labels nothing)"
                )
        return self.labeler.plan(
            counts,
            max_epsilon=plan.max_epsilon,
            delta=plan.delta,
            sample_rate=plan.sample_rate,
        )

    def _embed(self, ranks: Ranks) -> PoolEmbeddings:
        bank = embed_pool(
            self.pool,
            self.plan.encoder,
            self.cache_dir,
            given=self._given,
            batch_size=self._embedder.batch_size,
            num_workers=self._embedder.num_workers,
            device=self._embedder.device,
            ranks=ranks,
        )
        bad = bank.unreadable()
        if len(bad) and ranks.is_first:
            shown = ", ".join(self.pool.ids[row] for row in bad[:5].tolist())
            dots = ", …" if len(bad) > 5 else ""
            log.warning("left out %d pool images that cannot be read: %s%s", len(bad), shown, dots)
        return bank

    def _compress(self, bank: PoolEmbeddings, ranks: Ranks) -> CompressedPool:
        plan = self.plan
        num_readable = len(bank) - len(bank.unreadable())
        if num_readable < 2:
            raise ValueError(f"the pool {self.pool.name} holds fewer than 2 readable images")
        num_clusters = plan.num_clusters or default_num_clusters(num_readable, plan.noise_std)
        if num_clusters > num_readable:
            raise ValueError(
                f"probe.num_clusters={num_clusters} exceeds the pool's {num_readable} readable "
                "images"
            )
        return compress_pool(
            bank,
            bank.key,
            self.cache_dir,
            num_clusters=num_clusters,
            num_dims=plan.num_dims,
            num_iters=plan.num_iters,
            num_restarts=plan.num_restarts,
            seed=plan.seed,
            device=self._cluster_device,
            ranks=ranks,
        )

    def _ask_for_counts(self, compressed: CompressedPool) -> _Counts:
        plan = self.plan
        query = CoverageQuery(
            encoder=public_name(plan.encoder),
            encoder_fingerprint=self._encoder_fingerprint,
            mean=compressed.projection.mean.half(),
            components=compressed.projection.components.half(),
            centroids=compressed.centroids,
            noise_std=plan.noise_std,
            sample_rate=plan.sample_rate,
            attempt=plan.attempt,
        )
        content = query.to_bytes()
        answer = CoverageAnswer.from_bytes(self._conversation.ask(content))
        check_answer(answer, content, sample_rate=plan.sample_rate)
        check_integers("counts", answer.noisy_counts, (len(compressed.centroids),))
        check_noise(answer.noise_std, plan.noise_std * answer.max_per_unit)
        release = coverage_release(plan.noise_std, plan.sample_rate, answer.max_per_unit)
        return _Counts(answer.noisy_counts, answer.noise_std, release, answer.max_per_unit)

    def _select(
        self,
        bank: PoolEmbeddings,
        compressed: CompressedPool,
        counts: _Counts | None,
        client: Tensor | None,
    ) -> Selection:
        chosen = select(
            counts.noisy if counts else None,
            compressed.assignments,
            compressed.projected,
            compressed.centroids.float(),
            size=self.plan.size,
            strategy=self.plan.strategy,
            noise_std=counts.noise_std if counts else 0.0,
            generator=torch.Generator().manual_seed(self.plan.seed),
            full_embeddings=bank,
            candidates_per_pick=self.plan.candidates_per_pick,
            duplicate_distance=self.plan.duplicate_distance,
            among=self._in_oracle_domain(),
            client=client,
            device=self._cluster_device,
        )
        size, wanted = len(chosen.indices), self.plan.size
        if self.plan.strategy != "all" and size < wanted:
            log.warning("only %d images could be chosen, not the %d asked for", size, wanted)
        if chosen.num_duplicates:
            log.warning(
                "%d near-duplicates were left out (closer than selection.duplicate_distance=%g)",
                chosen.num_duplicates,
                self.plan.duplicate_distance,
            )
        if chosen.num_filled_up:
            log.warning(
                "%d of %d images lie outside the region that holds all of the client's estimated "
                "images (ask for fewer with selection.size, or lower privacy.noise_std)",
                chosen.num_filled_up,
                size,
            )
        return chosen

    def _in_oracle_domain(self) -> npt.NDArray[np.int64] | None:
        if self.plan.strategy != "oracle":
            return None
        domains = enumerate(self.pool.domains)
        found = [row for row, domain in domains if domain == self.plan.oracle_domain]
        return np.array(found, np.int64)

    def _label(
        self, chosen: ChosenEmbeddings, planned: Sequence[Release], number: int = 0
    ) -> Labels:
        return self.labeler.label(
            LabelingTask(
                pool=self.pool,
                indices=chosen.indices,
                embeddings=chosen.chunks,
                views=chosen.views,
                encoder=chosen.encoder,
                encoder_fingerprint=chosen.encoder.fingerprint(),
                ask=self._conversation.ask,
                planned=planned,
                seed=self.plan.seed,
                attempt=self.plan.attempt,
                number=number,
            )
        )

    def _commit(
        self,
        bank: PoolEmbeddings,
        compressed: CompressedPool,
        counts: _Counts | None,
        selection: Selection,
        labels: Labels,
    ) -> None:
        plan = self.plan
        indices = selection.indices.numpy()
        releases = [*([counts.release] if counts else []), *labels.releases]
        declared = [counts.max_per_unit] if counts else []
        declared += [labels.max_per_unit] if labels.releases else []
        # What the client's images were read for, no release accounts for.
        epsilon = None if self._revealed is not None else epsilon_of(releases, plan.delta)
        statement = asdict(PrivacyStatement(epsilon, plan.delta, unit=unit_of(declared)))
        proxy_set = ProxySet(
            ids=[self.pool.ids[index] for index in indices],
            clusters=torch.from_numpy(compressed.assignments[indices].astype(np.int64)),
            classes=labels.classes,
            targets=labels.targets,
            weights=labels.weights,
            pools=pool_names(self.pool.parts, indices),
            label_source=self.labeler.name,
            provenance={
                "pool": self.pool.name,
                "pool_fingerprint": self.pool.fingerprint,
                "pools": pools_of(self.pool.parts, indices),
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
            unlabeled=_rest_of_kept_clusters(compressed, selection),
            noisy_counts=counts.noisy if counts else None,
            cluster_sizes=compressed.cluster_sizes(),
            selection=selection,
            privacy=statement,
            spent_now=epsilon,
            communication=dict(self._conversation.traffic),
            releases=releases,
            seconds=self._seconds,
            num_unreadable=len(bank.unreadable()),
            fingerprint=self.fingerprint,
            from_disk=False,
            exchanges=list(self._conversation.exchanges),
            pool_sample=sample_pool(
                compressed.assignments,
                compressed.projected,
                compressed.centroids,
                selection.indices,
                seed=plan.seed,
            ),
        )
        with committed_folder(self._folder) as aside:
            result.save(aside)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = self._seconds.get(step, 0.0) + time.perf_counter() - start
        self._seconds[step] = round(seconds, 3)


@dataclass(frozen=True)
class _Counts:
    noisy: Tensor  # [R] int64
    noise_std: float
    release: Release
    max_per_unit: int


def _rest_of_kept_clusters(compressed: CompressedPool, selection: Selection) -> Tensor:
    """Pool places [m] int64 of the images of kept clusters that were not chosen, ascending."""
    # Unreadable images, of cluster -1, look up the last entry.
    kept = np.append(selection.kept.numpy(), False)
    found = np.flatnonzero(kept[compressed.assignments])
    return torch.from_numpy(np.setdiff1d(found, selection.indices.numpy(), assume_unique=True))
