"""Training on the client's own images: what the client could do alone; for comparison only."""

from __future__ import annotations

from typing import Any

import lightning as L

from datamodules.loaders import image_loader, place_of
from datamodules.proxy import LabelledImages, TrainingView, client_images, view_workers
from datamodules.scenario import Scenario
from datamodules.views import make_view
from ecos_pl.probe_result import ProbeResult


class LocalDataModule(L.LightningDataModule):
    """The client's labelled training images and its test images; no pool, no probe.

    It stands for a device that trains by itself, so nothing is released and ε is 0.

    Args:
        scenario: The simulated client.
        view: How images reach the training step.
        seed: Of the batches' order.
    """

    def __init__(self, scenario: Scenario, view: TrainingView, *, seed: int = 1) -> None:
        super().__init__()
        self.scenario, self.view, self.seed = scenario, view, seed
        self.probe_result: ProbeResult | None = None
        self.simulation: dict[str, float | None] = {}
        self.rounds: list[dict[str, Any]] = []

    def train_dataloader(self) -> Any:
        """Labelled batches of the client's training images."""
        images = client_images(self.scenario, "train", self.view.image_size)
        images.view = make_view(self.view.augment, self.view.image_size)
        return self._loader(images, train=True)

    def test_dataloader(self) -> Any:
        """The client's test images."""
        return self._loader(client_images(self.scenario, "test", self.view.image_size))

    def plain_images(self, part: str) -> LabelledImages:
        """Images to ``train`` on, without augmentation; none are ``held_out``."""
        images = client_images(self.scenario, "train", self.view.image_size)
        if part == "held_out":
            images.indices = []
        return images

    def _loader(self, images: LabelledImages, train: bool = False) -> Any:
        return image_loader(
            images,
            self.view.batch_size,
            num_workers=view_workers(self.view, self.trainer),
            train=train,
            seed=self.seed,
            **place_of(self.trainer),
        )
