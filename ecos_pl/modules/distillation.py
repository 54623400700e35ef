"""Knowledge distillation: a small student learns a frozen teacher's answers on the proxy set."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ecos_pl.classifier import Classifier
from ecos_pl.losses import distillation, feature_distillation, soft_cross_entropy
from ecos_pl.modules.compiling import CompiledPass, Pass
from ecos_pl.modules.optimization import adamw_one_cycle, decayed_weights
from ecos_pl.modules.scores import Scores
from ecos_pl.teacher import FrozenTeacher, resized


class DistillationModule(L.LightningModule):
    """Hinton's loss on every readable image, cross-entropy on the labelled ones, features too.

    Teacher and student see the same view, each at its own size: the teacher is patient and
    consistent (Beyer et al. 2022, §3). A batch is ``(images, targets, label_weights, weights,
    teacher_logits)``; the last are [B, 0] where the teacher is to be asked here and now.

    Args:
        model: The student.
        teacher: In no checkpoint, and no part of this module (`FrozenTeacher`).
        temperature: Of the distillation loss.
        distillation_weight: Of that loss, which keeps its τ² whether there are labels or not.
        label_weight: Of the cross-entropy on proxy labels; images without one count for nothing
            there, and a batch without any adds 0.
        feature_weight: Of the distance between the teacher's features and the student's, which a
            linear projector brings to its dimensions; 0 for none.
        learning_rate: At the peak of the cycle (``optimization.adamw_one_cycle``).
        weight_decay: Of AdamW, on weight matrices and kernels only.
        compiled: Run the student's training pass through ``torch.compile`` where that works.
    """

    def __init__(
        self,
        model: Classifier,
        teacher: FrozenTeacher,
        *,
        temperature: float = 2.0,
        distillation_weight: float = 1.0,
        label_weight: float = 0.0,
        feature_weight: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.teacher, self.scores = model, teacher, Scores(len(model.classes))
        self.projector = (
            nn.Linear(model.num_features, teacher.num_features) if feature_weight else None
        )
        self.temperature, self.distillation_weight = temperature, distillation_weight
        self.label_weight, self.feature_weight = label_weight, feature_weight
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.decayed = decayed_weights(self)
        self.compiled = compiled
        self._training_pass: Pass = self._student

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        logits: Tensor = self.model(images)
        return logits

    def on_fit_start(self) -> None:
        """Bring the teacher to the device, in whatever process this is."""
        self.teacher.to(self.device)
        if self.compiled:
            self._training_pass = CompiledPass(self._student, self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on a batch of views."""
        images, targets, label_weights, weights, teacher_logits = batch
        teacher_features = None
        if self.projector is not None or not teacher_logits.shape[1]:
            teacher_logits, teacher_features = self.teacher(images)
        logits, features = self._training_pass(resized(images, self.model.image_size))
        kd = distillation(logits, teacher_logits, weights, temperature=self.temperature)
        loss = self.distillation_weight * kd
        self.log("train/distillation", kd)
        if self.label_weight:
            loss = loss + self.label_weight * soft_cross_entropy(logits, targets, label_weights)
        if features is not None and teacher_features is not None:
            hint = feature_distillation(features, teacher_features, weights)
            self.log("train/features", hint)
            loss = loss + self.feature_weight * hint
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Agreement with the teacher on held-out images; no client data."""
        images, _, _, weights, teacher_logits = batch
        if not teacher_logits.shape[1]:
            teacher_logits, _ = self.teacher(images)
        logits = self(resized(images, self.model.image_size))
        self.scores.validate(self, logits, teacher_logits.float().softmax(dim=1), weights)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Accuracy on the simulated client's test images."""
        images, targets, weights = batch
        return self.scores.test(self, self(images), targets, weights)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its cycle over the planned number of steps."""
        return adamw_one_cycle(
            self, self.decayed, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )

    def _student(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.projector is None:
            return self.model(images), None
        logits, features = self.model.with_features(images)
        return logits, self.projector(features)
