"""Self-labelling: a timm backbone trained on the labelled proxy set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ecos_pl.backbone import create_backbone, pixel_statistics
from ecos_pl.losses import consistency, soft_cross_entropy

_LEFT_OUT = -1  # the class of images that metrics do not count


class SelfLabelingModule(L.LightningModule):
    """Cross-entropy on (soft, weighted, smoothed) proxy labels, plus FixMatch if wanted.

    The fresh head begins at zero, as in BiT (Kolesnikov et al. 2020): every class is equally
    likely at first, and the pretrained features are not shaken by a random head's gradients. With
    noisy labels and few steps that matters more than anything else here.

    AdamW under a one-cycle learning rate (Smith & Topin 2018): a tenth of the steps up, the rest
    down to nothing along a cosine.

    Args:
        classes: Names of the K classes.
        backbone: timm architecture.
        weights: See ``backbone.create_backbone``.
        image_size: Input side in pixels.
        learning_rate: At the peak of the cycle.
        weight_decay: Of AdamW, on weight matrices and kernels only.
        label_smoothing: Against noisy labels.
        consistency_weight: Of the FixMatch loss, when batches bring unlabelled views.
        consistency_threshold: FixMatch's confidence threshold.
        seed: Of the fresh head.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        backbone: str = "tf_efficientnet_lite0",
        weights: str = "auto",
        image_size: int = 48,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        label_smoothing: float = 0.1,
        consistency_weight: float = 0.0,
        consistency_threshold: float = 0.95,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.classes = list(classes)
        self.save_hyperparameters(logger=False)  # train.py logs the whole config, once
        self.net = create_backbone(
            backbone, weights, image_size=image_size, num_classes=len(self.classes), seed=seed
        ).to(memory_format=torch.channels_last)
        _zero_head(self.net)
        mean, std = pixel_statistics(backbone)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.label_smoothing = label_smoothing
        self.consistency_weight, self.consistency_threshold = (
            consistency_weight,
            consistency_threshold,
        )
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        # By name, not by shape, which a strategy that shards the weights changes later.
        self.decayed = {name for name, weight in self.named_parameters() if weight.ndim > 1}
        accuracy = MulticlassAccuracy(len(self.classes), average="micro", ignore_index=_LEFT_OUT)
        self.val_loss, self.val_accuracy = MeanMetric(), accuracy
        self.test_accuracy = accuracy.clone()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        pixels = (images.to(mean.dtype) - mean) / std
        logits: Tensor = self.net(pixels.contiguous(memory_format=torch.channels_last))
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
        """Agreement with the proxy labels of held-out images; no client data.

        The loss is the weighted mean over all images, however they are spread over batches and
        devices.
        """
        images, targets, weights = batch
        logits = self(images)
        self.val_loss.update(soft_cross_entropy(logits, targets, weights), weights.sum())
        self.val_accuracy.update(logits, _counted(targets, weights))
        self.log("val/loss", self.val_loss, batch_size=len(images))
        self.log("val/accuracy", self.val_accuracy, batch_size=len(images), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy on the simulated client's test images."""
        images, targets, weights = batch
        self.test_accuracy.update(self(images), _counted(targets, weights))
        self.log("simulation/test_accuracy", self.test_accuracy, batch_size=len(images))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its cycle over the planned number of steps."""
        weights = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in weights if name in self.decayed]},
            {"params": [p for name, p in weights if name not in self.decayed], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        # Not OneCycleLR: its checkpoint fixes the number of steps, so no run could be prolonged.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_one_cycle, steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _counted(targets: Tensor, weights: Tensor) -> Tensor:
    """Classes [B] of targets [B, K]; what has no weight is left out of a metric."""
    return targets.argmax(dim=1).where(weights > 0, _LEFT_OUT)


def _zero_head(net: torch.nn.Module) -> None:
    head = net.get_classifier()  # type: ignore[operator]  # every timm model has it
    if isinstance(head, torch.nn.Linear):
        torch.nn.init.zeros_(head.weight)
        if head.bias is not None:
            torch.nn.init.zeros_(head.bias)


def _one_cycle(num_steps: int, step: int) -> float:
    """Share of the highest learning rate: up within a tenth of the steps, then down to zero.

    >>> [round(_one_cycle(100, step), 3) for step in (0, 5, 10, 55, 100, 120)]
    [0.04, 0.52, 1.0, 0.5, 0.0, 0.0]
    """
    peak = max(1.0, 0.1 * num_steps)
    if step < peak:
        return 0.04 + 0.96 * step / peak
    done = min(1.0, (step - peak) / max(1.0, num_steps - peak))
    return 0.5 * (1 + math.cos(math.pi * done))
