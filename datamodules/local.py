"""Training on the client's own images: what the client could do alone; for comparison only."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.disjoint import check_disjoint, client_facts
from datamodules.loaders import image_loader, place_of
from datamodules.proxy import (
    LabelledImages,
    TrainingView,
    class_shares,
    client_images,
    view_workers,
)
from datamodules.scenario import Scenario
from datamodules.transfer import TransferImages
from datamodules.views import make_view
from ecos_pl.probe_result import ProbeResult
from ecos_pl.teacher import FrozenTeacher


class LocalDataModule(L.LightningDataModule):
    """The client's labelled training images and its test images; no pool, no probe.

    It stands for a device that trains by itself, so nothing is released and ε is 0.

    Args:
        scenario: The simulated client.
        view: How images reach the training step.
        seed: Of the batches' order.
        teacher: Whom a student is to follow; its scores of private images are never kept.
    """

    def __init__(
        self,
        scenario: Scenario,
        view: TrainingView,
        *,
        seed: int = 1,
        teacher: FrozenTeacher | None = None,
    ) -> None:
        super().__init__()
        self.scenario, self.view, self.seed, self.teacher = scenario, view, seed, teacher
        self.prepare_data_per_node = False
        self.probe_result: ProbeResult | None = None
        self.simulation: dict[str, float | None] = {}
        self.client_facts: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []

    def prepare_data(self) -> None:
        """Make sure that no image both trains and tests."""
        if not self.client_facts and self.scenario.client_train is not None:
            self.client_facts = client_facts(self.scenario)
            self.client_facts["disjoint"] = check_disjoint(self.scenario, with_pool=False)

    @property
    def class_shares(self) -> Tensor:
        """Frequencies [K] of the classes among the labels that are trained on."""
        images = client_images(self.scenario, "train", self.view.image_size)
        return class_shares(images.targets, images.weights)

    def train_dataloader(self) -> Any:
        """Labelled batches of the client's training images."""
        size = max(self.view.image_size, self.teacher.image_size if self.teacher else 0)
        images = client_images(self.scenario, "train", size)
        images.view = make_view(self.view.augment, size)
        if self.teacher is None:
            return self._loader(images, train=True)
        views = self.view.num_fixed_views
        transfer = TransferImages(images, images.weights, num_views=views, seed=self.seed)
        return self._loader(transfer, train=True)

    def test_dataloader(self) -> Any:
        """The client's test images."""
        return self._loader(client_images(self.scenario, "test", self.view.image_size))

    def plain_images(self, part: str) -> LabelledImages:
        """Images to ``train`` on, without augmentation; none are ``held_out``."""
        images = client_images(self.scenario, "train", self.view.image_size)
        if part == "held_out":
            images.rows = []
        return images

    def _loader(self, images: Dataset[Any], train: bool = False) -> Any:
        return image_loader(
            images,
            self.view.batch_size,
            num_workers=view_workers(self.view, self.trainer),
            train=train,
            seed=self.seed,
            **place_of(self.trainer),
        )
