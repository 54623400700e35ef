"""Compression: channels leave a trained network step by step, its teacher heals it in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ecos_pl.channels import fit_shapes
from ecos_pl.classifier import Classifier
from ecos_pl.losses import distillation, soft_cross_entropy
from ecos_pl.modules.compiling import CompiledPass, Pass
from ecos_pl.modules.optimization import adamw_one_cycle, decayed_weights
from ecos_pl.modules.scores import Scores
from ecos_pl.pruning import channel_groups, narrowed, prune, typical_gradients

KEY = "pruning"
"""Where a checkpoint says how often it was pruned."""

Batch = tuple[Tensor, Tensor, Tensor]


class CompressionModule(L.LightningModule):
    """Iterative structured pruning with knowledge distillation on the proxy set in between.

    At the start of planned epochs, channels leave in equal proportion until, after the last
    pruning, each set of layers has ``keep`` of those it started with. Gradients of the proxy
    labels' cross-entropy say which (Molchanov et al., CVPR 2019). Between prunings the network
    follows its teacher's soft predictions (Hinton et al. 2015). Weights are not averaged: they
    change their number.

    Args:
        model: What is compressed.
        teacher: Whom it follows: frozen, in eval mode, and in no checkpoint.
        keep: Share of the channels that stay in the end, in (0, 1]; 1: nothing is pruned.
        num_prunings: Steps in which they go.
        epochs_between: Epochs from one pruning to the next; the first comes at the start.
        measured_on: Makes the batches on which importance is measured.
        temperature: Of the distillation.
        label_weight: Of the proxy labels' cross-entropy beside the distillation.
        learning_rate: At the peak of the cycle (``optimization.adamw_one_cycle``).
        weight_decay: Of AdamW, on weight matrices and kernels only.
        compiled: Run the training pass through ``torch.compile`` where that works; after every
            pruning anew.
    """

    def __init__(
        self,
        model: Classifier,
        teacher: Classifier,
        *,
        keep: float,
        num_prunings: int = 3,
        epochs_between: int = 2,
        measured_on: Callable[[], Iterable[Batch]] = tuple,
        temperature: float = 4.0,
        label_weight: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if model.classes != teacher.classes or model.image_size != teacher.image_size:
            raise ValueError("the teacher must have the classes and the image size of its student")
        self.model, self.scores = model.train(), Scores(len(model.classes))
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: no part of this module
        self.keep, self.num_prunings = keep, num_prunings if keep < 1 else 0
        self.epochs_between, self.measured_on = epochs_between, measured_on
        self.temperature, self.label_weight = temperature, label_weight
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.decayed, self.compiled = decayed_weights(self), compiled
        self.full = channel_groups(model) if keep < 1 else {}
        self.num_pruned = 0
        self._training_pass: Pass = self.forward

    @property
    def teacher(self) -> Classifier:
        """Whom the model follows."""
        return self._teacher[0]

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        logits: Tensor = self.model(images)
        return logits

    # --- pruning -------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The teacher goes where the model is; compile, now that the device is known."""
        self.teacher.to(self.device)
        if self.compiled:
            self._training_pass = CompiledPass(self.forward, self)

    def on_train_epoch_start(self) -> None:
        """Prune if this epoch is due for it."""
        while self.num_pruned < self._due(self.current_epoch):
            self.prune()

    def _due(self, epoch: int) -> int:
        """Prunings that have been done when an epoch begins."""
        if getattr(self.trainer, "fast_dev_run", False):  # all there will ever be
            return self.num_prunings
        return min(self.num_prunings, 1 + epoch // self.epochs_between)

    def prune(self) -> None:
        """Remove the next share of channels; the optimizer starts anew on what is left."""
        gradients = typical_gradients(self.model, self._label_losses())
        share = self.keep ** ((self.num_pruned + 1) / self.num_prunings)
        prune(self.model, narrowed(self.full, share), gradients)
        self.num_pruned += 1
        if isinstance(self._training_pass, CompiledPass):
            self._training_pass.try_again()
        schedules = self.trainer.lr_scheduler_configs
        steps = [one.scheduler.last_epoch for one in schedules]
        self.trainer.strategy.setup_optimizers(self.trainer)
        for one, step in zip(self.trainer.lr_scheduler_configs, steps, strict=True):
            _go_to(one.scheduler, step)  # the cycle goes on

    def _label_losses(self) -> Iterator[Tensor]:
        """Cross-entropy of each batch that importance is measured on.

        Against the proxy labels, not the teacher's scores: as long as the model is its teacher,
        those have no gradient. Images without a label take the teacher's class.
        """
        training = self.model.training
        self.model.eval()
        for images, targets, weights in self.measured_on():
            images, targets, weights = (t.to(self.device) for t in (images, targets, weights))
            with torch.no_grad():
                classes = self.teacher(images).argmax(dim=1)
            guessed = torch.nn.functional.one_hot(classes, targets.shape[1]).to(targets)
            targets = torch.where((weights > 0)[:, None], targets, guessed)
            with self.trainer.precision_plugin.forward_context():
                logits = self(images)
            yield soft_cross_entropy(logits, targets, torch.ones_like(weights))
        self.model.train(training)

    # --- training ------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step towards the teacher's scores of the same views."""
        images, targets, weights = batch
        with torch.no_grad():
            wanted = self.teacher(images)
        logits = self._training_pass(images)
        followed = distillation(
            logits, wanted, (weights > 0).to(weights), temperature=self.temperature
        )
        loss = followed
        if self.label_weight:
            loss = loss + self.label_weight * soft_cross_entropy(logits, targets, weights)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Agreement with the proxy labels, and with the teacher, on held-out images."""
        images, targets, weights = batch
        logits = self(images)
        self.scores.validate(self, logits, targets, weights)
        same = logits.argmax(dim=1) == self.teacher.to(self.device)(images).argmax(dim=1)
        self.log("val/teacher_agreement", same.float().mean(), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Accuracy on the simulated client's test images."""
        images, targets, weights = batch
        return self.scores.test(self, self(images), targets, weights)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its cycle over the planned number of steps."""
        return adamw_one_cycle(
            self, self.decayed, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )

    # --- resume --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how often the weights were pruned; their shapes say the rest."""
        checkpoint[KEY] = self.num_pruned

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the checkpoint's structure, before its weights are loaded."""
        prefix = "model.net."
        state = checkpoint["state_dict"]
        shapes = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        fit_shapes(self.model.net, shapes)
        self.model.net.to(memory_format=torch.channels_last)  # the same kernels, the same rounding
        self.num_pruned = int(checkpoint[KEY])


def _go_to(schedule: Any, step: int) -> None:
    schedule.last_epoch = step
    for group, factor, base in zip(
        schedule.optimizer.param_groups, schedule.lr_lambdas, schedule.base_lrs, strict=True
    ):
        group["lr"] = base * factor(step)
