"""Self-labelling: a timm backbone trained on the labelled proxy set."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ecos_pl.classifier import Classifier
from ecos_pl.losses import consistency, logit_adjusted, soft_cross_entropy
from ecos_pl.modules.compiling import CompiledPass, Pass
from ecos_pl.modules.optimization import adamw_one_cycle, decayed_weights
from ecos_pl.modules.scores import Scores
from ecos_pl.pseudo_labels import PseudoLabels

Method = Literal["supervised", "fixmatch", "flexmatch"]
PseudoLabelsFrom = Literal["model", "average"]


class SelfLabelingModule(L.LightningModule):
    """Cross-entropy on (soft, weighted, smoothed) proxy labels, and FixMatch where wanted.

    Nothing more is done about wrong labels, since in so short a training nothing more helped: in
    trials on mixed_digits at 32 px (one seed and one setting each), targets mixed with what the
    averaged weights predict, generalised cross-entropy and co-divide all ended below plain soft
    targets with smoothing and averaged weights.

    Args:
        model: What is trained.
        method: What becomes of unlabelled views: FixMatch (Sohn et al. 2020) or FlexMatch (Zhang
            et al. 2021).
        learning_rate: At the peak of the cycle (``optimization.adamw_one_cycle``).
        weight_decay: Of AdamW, on weight matrices and kernels only.
        label_smoothing: Against noisy labels.
        class_balance: Strength of ``losses.logit_adjusted``; 0 for none.
        consistency_weight: Of the loss on unlabelled views.
        consistency_threshold: Probability from which a pseudo-label counts.
        least_threshold: Below which FlexMatch lowers that of no class.
        align: Whether pseudo-labels are moved to the proxy labels' class frequencies.
        pseudo_labels_from: Whose predictions on weak views they are: the ``model``'s (FixMatch), or
            those of its ``average`` over the steps so far, as Mean Teacher has it (Tarvainen &
            Valpola 2017), where the trainer averages weights.
        freeze_backbone: Train the head alone, on the features as they are.
        compiled: Run the training pass through ``torch.compile`` where that works.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        method: Method = "supervised",
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        label_smoothing: float = 0.1,
        class_balance: float = 0.0,
        consistency_weight: float = 1.0,
        consistency_threshold: float = 0.95,
        least_threshold: float = 0.5,
        align: bool = False,
        pseudo_labels_from: PseudoLabelsFrom = "model",
        freeze_backbone: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.scores = model, Scores(len(model.classes))
        self.method, self.align, self.compiled = method, align, compiled
        self.label_smoothing, self.class_balance = label_smoothing, class_balance
        self.consistency_weight, self.threshold = consistency_weight, consistency_threshold
        self.least_threshold = least_threshold
        self.pseudo_labels_from = pseudo_labels_from
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.decayed = decayed_weights(self)
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            model.freeze_backbone()
            self.train()
        self.pseudo_labels: PseudoLabels | None = None
        self.class_shares = torch.full((len(model.classes),), 1 / len(model.classes))
        self._remembered: dict[str, Tensor] = {}
        self._training_pass: Pass = self.forward

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        logits: Tensor = self.model(images)
        return logits

    def train(self, mode: bool = True) -> SelfLabelingModule:
        """Set the mode; a frozen backbone keeps its batch statistics too."""
        super().train(mode)
        if self.freeze_backbone:
            self.model.eval()
        return self

    def on_fit_start(self) -> None:
        """Compile, now that the device is known."""
        if self.compiled:
            self._training_pass = CompiledPass(self.forward, self)

    def on_train_start(self) -> None:
        """Begin the memory of pseudo-labels, or go on with that of the checkpoint."""
        self._count_classes()
        self.pseudo_labels = PseudoLabels(
            len(self.model.classes),
            self.threshold,
            num_unlabeled=self._data().num_unlabeled if self.method == "flexmatch" else None,
            align=self.align,
            device=self.device,
            gather=self.all_gather,
            least=self.least_threshold,
        )
        self.pseudo_labels.load_state_dict(self._remembered)

    def on_train_epoch_start(self) -> None:
        """Count the classes again: labels may be new."""
        self._count_classes()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on a labelled batch, or on ``{"labelled": …, "unlabelled": …}``."""
        if isinstance(batch, dict):
            images, targets, weights = batch["labelled"]
            weak, strong, rows = batch["unlabelled"]
            # One pass over all views: batch statistics see labelled and unlabelled images alike.
            logits, weak_logits, strong_logits = self._training_pass(
                torch.cat([images, weak, strong])
            ).split([len(images), len(weak), len(strong)])
            if self.pseudo_labels_from == "average":
                weak_logits = self._averaged(weak)
            unlabelled = self._consistency(weak_logits, strong_logits, rows)
        else:
            images, targets, weights = batch
            logits, unlabelled = (
                self._training_pass(images),
                images.new_zeros((), dtype=torch.float32),
            )
        if self.class_balance:
            logits = logit_adjusted(logits, self.class_shares, self.class_balance)
        labelled = soft_cross_entropy(
            logits, targets, weights, label_smoothing=self.label_smoothing
        )
        loss = labelled + self.consistency_weight * unlabelled
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def _averaged(self, images: Tensor) -> Tensor:
        """Class scores of the averaged model, in eval mode; no part of what is delivered."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                model = callback._average_model.module.model
                assert isinstance(model, Classifier)
                logits: Tensor = model.eval()(images)
                return logits
        raise RuntimeError("nobody averages the weights: pseudo-labels are the model's own")

    def _consistency(self, weak_logits: Tensor, strong_logits: Tensor, rows: Tensor) -> Tensor:
        assert self.pseudo_labels is not None
        probabilities, threshold = self.pseudo_labels(
            weak_logits.detach().float().softmax(dim=1), rows, self.class_shares
        )
        loss = consistency(probabilities, strong_logits, threshold=threshold)
        self.log("train/consistency", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Agreement with the proxy labels of held-out images."""
        images, targets, weights = batch
        self.scores.validate(self, self(images), targets, weights)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Accuracy on the simulated client's test images."""
        images, targets, weights = batch
        return self.scores.test(self, self(images), targets, weights)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its cycle over the planned number of steps."""
        return adamw_one_cycle(
            self, self.decayed, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the memory of pseudo-labels, which is no part of the model."""
        if self.pseudo_labels is not None:
            checkpoint["pseudo_labels"] = self.pseudo_labels.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was remembered until training starts."""
        self._remembered = checkpoint.get("pseudo_labels", {})

    def _count_classes(self) -> None:
        if self.class_balance or self.align:
            self.class_shares = self._data().class_shares.to(self.device)

    def _data(self) -> Any:
        """The datamodule: knows ``class_shares`` and ``num_unlabeled``."""
        return self.trainer.datamodule  # type: ignore[attr-defined]
