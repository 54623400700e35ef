"""The LightningDataModule that runs the ECOS probe in ``setup()`` and serves the proxy set."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.disjoint import check_disjoint, client_facts
from datamodules.loaders import default_workers, equally_long, image_loader, place_of
from datamodules.scenario import Scenario
from datamodules.transfer import TransferImages, teacher_logits
from datamodules.views import Augment, make_view
from ecos_pl.client import Client
from ecos_pl.client_policy import ClientPolicy
from ecos_pl.compressed_pool import CompressedPool
from ecos_pl.evaluation import class_numbers, domain_purity, domain_share, label_accuracy
from ecos_pl.images import ImageSource, UnreadableImage, to_tensor
from ecos_pl.label_rounds import LabelRound
from ecos_pl.labeling import Labeler
from ecos_pl.mailbox import InProcessMailbox, Mailbox
from ecos_pl.pool_embeddings import PoolEmbeddings
from ecos_pl.privacy import MIN_NOISE_STD
from ecos_pl.probe import Probe, ProbePlan
from ecos_pl.probe_result import ProbeResult
from ecos_pl.proxy_set import ProxySet
from ecos_pl.ranks import Ranks
from ecos_pl.relabeling import Relabeler
from ecos_pl.revealed_client import RevealedClient
from ecos_pl.storage import fingerprint_of
from ecos_pl.teacher import FrozenTeacher

MIN_SIMULATED_MULTIPLIER = 0.05
"""Noise below which a simulated client refuses: its ε is limited by the plan's max_epsilon."""


@dataclass(frozen=True)
class TrainingView:
    """How images reach the training step.

    Attributes:
        image_size: Side in pixels.
        batch_size: Labelled images per step and device.
        augment: see ``views.make_view``.
        unlabeled_ratio: Unlabelled images per labelled one; 0 for none.
        val_fraction: Share of the labelled images held out.
        num_workers: Processes that read images, for each device; None for what the cores allow.
        num_views: Fixed views of an image that a teacher is asked about; None draws new ones.
            Without augmentation there is only one.
    """

    image_size: int = 48
    batch_size: int = 64
    augment: Augment = "affine"
    unlabeled_ratio: int = 0
    val_fraction: float = 0.1
    num_workers: int | None = 0
    num_views: int | None = None

    @property
    def num_fixed_views(self) -> int | None:
        """Views of an image that ever occur; None without limit."""
        return 1 if self.augment == "none" else self.num_views


class LabelledImages(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images of a source as ``(uint8 [3, S, S], target [K], weight [])``.

    An image that cannot be read any more is grey and has weight 0.

    Args:
        source: Where the images are.
        indices: [n], places of the images there.
        targets: [n, K]; may change while loaders are at work, if in shared memory.
        weights: [n], likewise.
        image_size: Side S in pixels.
        augment: See ``views.make_view``.
        rows: Which of the n images are served; None for all.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int],
        targets: Tensor,
        weights: Tensor,
        image_size: int,
        augment: Augment = "none",
        rows: Sequence[int] | None = None,
    ) -> None:
        self.source, self.indices = source, indices
        self.targets, self.weights, self.image_size = targets, weights, image_size
        self.rows = range(len(indices)) if rows is None else rows
        self.view = make_view(augment, image_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        row = self.rows[position]
        # Copies: a batch that is being loaded must not change with the labels.
        target, weight = self.targets[row].clone(), self.weights[row].clone()
        try:
            image = to_tensor(self.source.read(self.indices[row]), self.image_size)
        except UnreadableImage:
            grey = torch.full((3, self.image_size, self.image_size), 127, dtype=torch.uint8)
            return grey, target, torch.zeros_like(weight)
        return self.view(image), target, weight


@dataclass(frozen=True)
class _Labels:
    """Targets [n, K] and weights [n] in memory that loaders' processes share."""

    targets: Tensor
    weights: Tensor

    @classmethod
    def shared(cls, proxy_set: ProxySet) -> _Labels:
        return cls(
            proxy_set.targets.clone().share_memory_(), proxy_set.weights.clone().share_memory_()
        )

    def replace(self, proxy_set: ProxySet) -> None:
        self.targets.copy_(proxy_set.targets)
        self.weights.copy_(proxy_set.weights)


class UnlabelledViews(Dataset[tuple[Tensor, Tensor, int]]):
    """Two views of each image, weak and strong, drawn anew each time, and its row (FixMatch)."""

    def __init__(
        self, source: ImageSource, indices: Sequence[int], image_size: int, augment: Augment
    ) -> None:
        self.source, self.indices, self.image_size = source, indices, image_size
        self.weak = make_view(augment, image_size)
        self.strong = make_view(augment, image_size, strong=True)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        try:
            image = to_tensor(self.source.read(self.indices[position]), self.image_size)
        except UnreadableImage:
            image = torch.full((3, self.image_size, self.image_size), 127, dtype=torch.uint8)
        return self.weak(image), self.strong(image), position


class ProxySamplingDataModule(L.LightningDataModule):
    """Runs the probe and serves what it chose; tests on the client's own test images.

    ``setup()`` runs for every stage, on every rank, and before checkpoints load, so the probe's
    result lives on disk under its fingerprint: the ranks make it together, and all read it.

    Args:
        scenario: The public pool and the (simulated) client.
        plan: The probe's plan.
        labeler: Who labels the proxy set.
        view: How images reach the training step.
        relabeler: Lays other labels over the probe's; None keeps those.
        run_root: Folder that holds the cache and the simulated clients.
        mailbox: The way to a client elsewhere; None simulates one from the scenario's images.
        cache_dir: For probe results; None for ``run_root/cache``. On a disk that all ranks see.
        given_embeddings: Files of embeddings made elsewhere: of the pool, or by name of its parts.
        embed_batch_size: Images embedded at once.
        embed_workers: Processes that read images for the encoder.
        seed: Of the held-out part and of the batches' order.
        teacher: Whom a student is to follow. All chosen images then train, labelled or not, as
            ``TransferImages`` of the larger of both networks' image sizes.
        ask_teacher_once: Where the views are fixed, keep the teacher's scores on disk.

    Attributes:
        probe_result: What the probe found, from ``setup()`` on.
        probe_seconds: How long finding it, or reading it from disk, took.
        simulation: ``purity``, ``random_purity``, ``label_accuracy``: from ground truth that only
            a benchmark has; None where it is unknown.
        client_facts: Who the simulated client is, and what was compared to tell its images from
            the pool's; from ``prepare_data()`` on, in the process that runs it.
        rounds: What further rounds of labels came to: ``epoch``, ``changed`` (share of images
            with another label), ``label_accuracy`` (simulation), ``bytes_down``.
    """

    def __init__(
        self,
        scenario: Scenario,
        plan: ProbePlan,
        labeler: Labeler,
        view: TrainingView,
        *,
        relabeler: Relabeler | None = None,
        run_root: Path,
        mailbox: Mailbox | None = None,
        cache_dir: Path | None = None,
        given_embeddings: Mapping[str, Path] | Path | None = None,
        embed_batch_size: int = 256,
        embed_workers: int | None = None,
        seed: int = 1,
        teacher: FrozenTeacher | None = None,
        ask_teacher_once: bool = True,
    ) -> None:
        super().__init__()
        self.teacher, self.ask_teacher_once = teacher, ask_teacher_once
        self._teacher_logits: Tensor | None = None
        self.scenario, self.plan, self.labeler, self.view = scenario, plan, labeler, view
        self.relabeler = relabeler
        self.run_root, self.cache_dir = run_root, cache_dir or run_root / "cache"
        self.mailbox, self.given_embeddings = mailbox, given_embeddings
        self.prepare_data_per_node = False  # all nodes see one disk
        self.embed_batch_size, self.embed_workers = embed_batch_size, embed_workers
        self.seed = seed
        self.probe_result: ProbeResult | None = None
        self.probe_seconds = 0.0
        self.simulation: dict[str, float | None] = {}
        self.client_facts: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self._labels: _Labels | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Processes that are started afresh open their own way to the client.
        return {name: value for name, value in self.__dict__.items() if name != "_probe"}

    def prepare_data(self) -> None:
        """Open the pool: listing or indexing a large one takes long, and is for one rank to do.

        In a simulation, also make sure that the pool has none of the client's images.
        """
        len(self.scenario.pool)
        if self.mailbox is None and self.scenario.client_train is not None:
            self.client_facts = client_facts(self.scenario)
            self.client_facts["disjoint"] = check_disjoint(self.scenario, self.cache_dir)

    def setup(self, stage: str) -> None:
        """Run the probe, or read its result."""
        if self.probe_result is None:
            start = time.perf_counter()
            # Isolated: whether results were on disk must not change the training.
            with isolate_rng(), Ranks.of_processes() as ranks:
                self.probe_result = self._labelled_elsewhere(self._probe.run(ranks), ranks)
            self.probe_seconds = time.perf_counter() - start
            self.simulation = self._evaluate(self.probe_result)
            self._labels = _Labels.shared(self.probe_result.proxy_set)
        if stage == "fit" and self.teacher is not None and self._teacher_logits is None:
            with isolate_rng():
                self._teacher_logits = self._ask_teacher(self.teacher, self.probe_result)

    def ask_again(self, number: int, backbone: Path, image_size: int, ranks: Ranks) -> LabelRound:
        """One further round of labels (``Probe.ask_again``); all ranks call this."""
        return self._probe.ask_again(
            self._result(), number, backbone, image_size=image_size, ranks=ranks
        )

    def relabel(self, found: LabelRound, epoch: int) -> None:
        """Train on the labels of a further round from the next batch that is loaded on."""
        self.probe_result = result = self._result().with_round(found)
        assert self._labels is not None
        self._labels.replace(result.proxy_set)  # loaders' processes see it, too
        self.simulation = self._evaluate(result)
        self.rounds.append(
            {
                "epoch": epoch,
                "changed": found.changed,
                "label_accuracy": self.simulation["label_accuracy"],
                "bytes_down": found.traffic["bytes_down"],
            }
        )

    def pool_on_disk(self) -> tuple[PoolEmbeddings, CompressedPool] | None:
        """The pool's embeddings and clusters, for one rank (``Probe.pool_on_disk``)."""
        return self._probe.pool_on_disk()

    @property
    def num_unlabeled(self) -> int:
        """Images that batches may bring besides the labelled ones."""
        return len(self._result().unlabeled)

    @property
    def class_shares(self) -> Tensor:
        """Frequencies [K] of the classes among the labels that are trained on."""
        result = self._result()
        rows = self._split(result)[0]
        return class_shares(result.proxy_set.targets[rows], result.proxy_set.weights[rows])

    def train_dataloader(self) -> Any:
        """Labelled batches; with unlabelled ones beside them if the view asks for it."""
        result, view = self._result(), self.view
        rows = self._split(result)[0]
        labelled = self._loader(self._images(result, rows, view.augment), train=True)
        if not view.unlabeled_ratio or not self.num_unlabeled:
            return labelled
        unlabeled = result.unlabeled.tolist()
        views = UnlabelledViews(self.scenario.pool, unlabeled, view.image_size, view.augment)
        size = view.batch_size * view.unlabeled_ratio
        unlabelled = self._loader(views, train=True, batch_size=size)
        loaders = {"labelled": labelled, "unlabelled": unlabelled}
        return CombinedLoader(equally_long(loaders), mode="min_size")

    def val_dataloader(self) -> Any:
        """The held-out part of the proxy set, with its pseudo-labels; no client data."""
        result = self._result()
        rows = self._split(result)[1]
        return self._loader(self._images(result, rows, "none")) if len(rows) else []

    def test_dataloader(self) -> Any:
        """The client's test images with their true classes: a simulation."""
        if self.scenario.client_test is None:
            return []
        return self._loader(client_images(self.scenario, "test", self.view.image_size))

    def plain_images(self, part: str) -> LabelledImages:
        """Images to ``train`` on, or ``held_out``, without augmentation."""
        result = self._result()
        rows = self._split(result)[part == "held_out"]
        return self._labelled(result, rows, "none")

    def _labelled_elsewhere(self, result: ProbeResult, ranks: Ranks) -> ProbeResult:
        return result if self.relabeler is None else self.relabeler.apply(result, ranks)

    @cached_property
    def _probe(self) -> Probe:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        num_workers = default_workers(self.embed_workers, trainer.num_devices if trainer else 1)
        return Probe(
            self.scenario.pool,
            self.plan,
            self.labeler,
            self._mailbox_for,
            self.cache_dir,
            client_id=self._client_id(),
            revealed=self._revealed(device, num_workers),
            given_embeddings=self._given_by_part(),
            device=device,
            batch_size=self.embed_batch_size,
            num_workers=num_workers,
        )

    def _revealed(self, device: torch.device, num_workers: int) -> RevealedClient | None:
        """The benchmark's own client images; a client behind a mailbox shows nothing."""
        if self.mailbox is not None:
            return None
        return RevealedClient(
            self._private(),
            self._client_folder,
            device=device,
            batch_size=self.embed_batch_size,
            num_workers=num_workers,
        )

    def _client_folder(self, fingerprint: str) -> Path:
        """The simulated client's folder for a probe."""
        return self.run_root / "clients" / fingerprint[:16]

    def _given_by_part(self) -> Mapping[str, Path]:
        given, parts = self.given_embeddings, self.scenario.pool.parts
        if not isinstance(given, Path):
            return given or {}
        if len(parts) > 1:
            raise ValueError(
                "data.embeddings: the pool file lists several pools; name each one's there, as in "
                "embeddings: FILE"
            )
        return {parts[0].name: given}

    def _client_id(self) -> str:
        if self.mailbox is not None:
            return self.mailbox.client_id
        return self._private().fingerprint

    def _private(self) -> ImageSource:
        if self.scenario.client_train is None:
            raise ValueError("the client's images are not here: ask it with client=mailbox")
        return self.scenario.client_train

    def _mailbox_for(self, fingerprint: str) -> Mailbox:
        """The way to the client; a simulated one's ledger knows this probe's releases alone."""
        if self.mailbox is not None:
            return self.mailbox

        def make() -> Client:
            policy = ClientPolicy(
                max_epsilon=self.plan.max_epsilon,
                delta=self.plan.delta,
                min_noise_std=MIN_NOISE_STD,
                min_noise_multiplier=MIN_SIMULATED_MULTIPLIER,
                max_sample_rate=self.plan.sample_rate,
                encoder=self.plan.encoder,
            )
            return Client.simulated(self._client_folder(fingerprint), self._private(), policy)

        return InProcessMailbox(make, client_id=self._client_id())

    def _evaluate(self, result: ProbeResult) -> dict[str, float | None]:
        pool, domain = self.scenario.pool, self.scenario.client_domain
        chosen = result.indices.tolist()
        return {
            "purity": domain_purity(pool, chosen, domain),
            "random_purity": domain_share(pool, domain),
            "label_accuracy": label_accuracy(result.proxy_set, pool, chosen, domain),
        }

    def _split(self, result: ProbeResult) -> tuple[Tensor, Tensor]:
        """Rows of the proxy set to train on and to hold out, at random: all, or labelled ones."""
        counts = result.proxy_set.weights > (0 if self.teacher is None else -1)
        labelled = torch.nonzero(counts).flatten()
        generator = torch.Generator().manual_seed(self.seed)
        shuffled = labelled[torch.randperm(len(labelled), generator=generator)]
        num_held_out = min(int(self.view.val_fraction * len(shuffled)), len(shuffled) - 1)
        return shuffled[num_held_out:].sort().values, shuffled[:num_held_out].sort().values

    def _labelled(self, result: ProbeResult, rows: Tensor, augment: Augment) -> LabelledImages:
        assert self._labels is not None
        return LabelledImages(
            self.scenario.pool,
            result.indices.tolist(),
            self._labels.targets,
            self._labels.weights,
            self.view.image_size,
            augment,
            rows.tolist(),
        )

    def _images(self, result: ProbeResult, rows: Tensor, augment: Augment) -> Dataset[Any]:
        if self.teacher is None:
            return self._labelled(result, rows, augment)
        return Subset(self._transfer(self.teacher, result, augment), rows.tolist())

    def _transfer(
        self, teacher: FrozenTeacher, result: ProbeResult, augment: Augment
    ) -> TransferImages:
        """All chosen images, in views of the fixed ones if these are meant to be augmented so."""
        fixed = self.view.num_fixed_views if augment == self.view.augment else None
        proxy_set = result.proxy_set
        images = LabelledImages(
            self.scenario.pool,
            result.indices.tolist(),
            proxy_set.targets,
            torch.ones(len(proxy_set)),
            max(self.view.image_size, teacher.image_size),
            augment,
        )
        return TransferImages(
            images,
            proxy_set.weights,
            num_views=fixed,
            seed=self.seed,
            logits=self._teacher_logits if fixed else None,
        )

    def _ask_teacher(self, teacher: FrozenTeacher, result: ProbeResult) -> Tensor | None:
        if self.view.num_fixed_views is None or not self.ask_teacher_once:
            return None
        images = self._transfer(teacher, result, self.view.augment)
        facts = [
            self.scenario.pool.fingerprint,
            fingerprint_of(result.indices.tolist()),
            self.view.augment,
            max(self.view.image_size, teacher.image_size),
        ]
        with Ranks.of_processes() as ranks:
            return teacher_logits(
                teacher,
                images,
                facts,
                self.cache_dir,
                device=self.trainer.strategy.root_device if self.trainer else "cpu",
                batch_size=self.view.batch_size,
                num_workers=view_workers(self.view, self.trainer),
                ranks=ranks,
            )

    def _loader(
        self, dataset: Dataset[Any], train: bool = False, batch_size: int | None = None
    ) -> DataLoader[Any]:
        return image_loader(
            dataset,
            batch_size or self.view.batch_size,
            num_workers=view_workers(self.view, self.trainer),
            train=train,
            seed=self.seed,
            **place_of(self.trainer),
        )

    def _result(self) -> ProbeResult:
        if self.probe_result is None:
            raise RuntimeError("the probe has not run: call setup() first")
        return self.probe_result


def class_shares(targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted frequencies [K] of classes among targets [n, K] of weights [n]."""
    return (weights[:, None] * targets).sum(dim=0) / weights.sum()


def client_images(scenario: Scenario, part: str, image_size: int) -> LabelledImages:
    """The client's ``train`` or ``test`` images with their true classes, for a simulation."""
    source = scenario.client_train if part == "train" else scenario.client_test
    if source is None:
        raise ValueError("the client's images are not here: train_on=client needs them")
    numbers = class_numbers(source, scenario.classes)
    rows = torch.nonzero(numbers >= 0).flatten()
    targets = torch.nn.functional.one_hot(numbers[rows], len(scenario.classes)).float()
    return LabelledImages(source, rows.tolist(), targets, torch.ones(len(rows)), image_size)


def view_workers(view: TrainingView, trainer: Any) -> int:
    """Worker processes of each loader on each device."""
    return default_workers(view.num_workers, trainer.num_devices if trainer else 1)
