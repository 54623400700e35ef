"""Self-labelling: a timm backbone trained on the labelled proxy set."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ecos_pl.classifier import Classifier
from ecos_pl.losses import consistency, soft_cross_entropy
from ecos_pl.modules.optimization import adamw_one_cycle, decayed_weights
from ecos_pl.modules.scores import Scores


class SelfLabelingModule(L.LightningModule):
    """Cross-entropy on (soft, weighted, smoothed) proxy labels, plus FixMatch if wanted.

    Args:
        model: What is trained.
        learning_rate: At the peak of the cycle (``optimization.adamw_one_cycle``).
        weight_decay: Of AdamW, on weight matrices and kernels only.
        label_smoothing: Against noisy labels.
        consistency_weight: Of the FixMatch loss, when batches bring unlabelled views.
        consistency_threshold: FixMatch's confidence threshold.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        label_smoothing: float = 0.1,
        consistency_weight: float = 0.0,
        consistency_threshold: float = 0.95,
    ) -> None:
        super().__init__()
        self.model, self.scores = model, Scores(len(model.classes))
        self.label_smoothing = label_smoothing
        self.consistency_weight, self.consistency_threshold = (
            consistency_weight,
            consistency_threshold,
        )
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.decayed = decayed_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on a labelled batch, or on ``{"labelled": …, "unlabelled": …}``."""
        if isinstance(batch, dict):
            images, targets, weights = batch["labelled"]
            weak, strong = batch["unlabelled"]
            # One pass over all views: batch statistics see labelled and unlabelled images alike.
            logits, weak_logits, strong_logits = self(torch.cat([images, weak, strong])).split(
                [len(images), len(weak), len(strong)]
            )
            unlabelled = consistency(
                weak_logits, strong_logits, threshold=self.consistency_threshold
            )
            self.log("train/consistency", unlabelled)
        else:
            images, targets, weights = batch
            logits, unlabelled = self(images), images.new_zeros((), dtype=torch.float32)
        labelled = soft_cross_entropy(
            logits, targets, weights, label_smoothing=self.label_smoothing
        )
        loss = labelled + self.consistency_weight * unlabelled
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Agreement with the proxy labels of held-out images."""
        images, targets, weights = batch
        self.scores.validate(self, self(images), targets, weights)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy on the simulated client's test images."""
        images, targets, weights = batch
        self.scores.test(self, self(images), targets, weights)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its cycle over the planned number of steps."""
        return adamw_one_cycle(
            self, self.decayed, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )
