"""What every method measures: held-out proxy labels while it trains, the client's test images."""

from __future__ import annotations

import lightning as L
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ecos_pl.losses import soft_cross_entropy

LEFT_OUT = -1
"""The class of images that metrics do not count."""


class Scores(nn.Module):
    """Metrics over all images, however they are spread over batches and devices.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=LEFT_OUT)
        self.val_loss, self.val_accuracy = MeanMetric(), accuracy
        self.test_accuracy = accuracy.clone()

    def validate(
        self, module: L.LightningModule, logits: Tensor, targets: Tensor, weights: Tensor
    ) -> None:
        """Log agreement with the proxy labels of held-out images; no client data.

        Args:
            module: Logs ``val/loss`` (the weighted mean, in nats) and ``val/accuracy``.
            logits: [B, K].
            targets: [B, K] class probabilities.
            weights: [B], 0 for what does not count.
        """
        self.val_loss.update(soft_cross_entropy(logits, targets, weights), weights.sum())
        self.val_accuracy.update(logits, _counted(targets, weights))
        module.log("val/loss", self.val_loss, batch_size=len(logits))
        module.log("val/accuracy", self.val_accuracy, batch_size=len(logits), prog_bar=True)

    def test(
        self, module: L.LightningModule, logits: Tensor, targets: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Log accuracy on the simulated client's test images.

        Returns:
            For callbacks that tell more of it: ``logits`` [B, K], and true ``classes`` [B], -1 for
            what does not count.
        """
        classes = _counted(targets, weights)
        self.test_accuracy.update(logits, classes)
        module.log("simulation/test_accuracy", self.test_accuracy, batch_size=len(logits))
        return {"logits": logits, "classes": classes}


def _counted(targets: Tensor, weights: Tensor) -> Tensor:
    """Classes [B] of targets [B, K]; what has no weight is left out of a metric."""
    return targets.argmax(dim=1).where(weights > 0, LEFT_OUT)
