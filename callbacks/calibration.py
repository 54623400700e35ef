"""Whether the model is as sure as it is right, on the client's test images: a simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError
from typing_extensions import override

from callbacks.confusion_matrix import classes_of
from callbacks.figures import BLUE, DARK, GREY, new_figure, plain_axes, save_figure
from callbacks.logging_to import log_scalars
from ecos_pl.modules.scores import LEFT_OUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_BINS = 15


class Calibration(Callback):
    """Logs ``simulation/calibration_error`` and writes ``figures/calibration.png`` after a test.

    The expected calibration error (Guo et al. 2017): how far the confidence of the most probable
    class is from the share of right answers, on average over bins of confidence.

    Tests run in simulations alone: the test images of a real client are not here.
    """

    def __init__(self) -> None:
        self._metrics: MetricCollection | None = None

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_classes, self._metrics = len(classes_of(pl_module)), None
        if not num_classes:
            return
        error = MulticlassCalibrationError(
            num_classes, n_bins=NUM_BINS, ignore_index=LEFT_OUT, validate_args=False
        )
        metrics = MetricCollection(
            {"error": error, "bins": ReliabilityBins()}, compute_groups=False
        )
        self._metrics = metrics.to(pl_module.device)
        # One image that does not count: a rank that gets no other has something to gather, too.
        nothing = torch.ones(1, num_classes, device=pl_module.device) / num_classes
        left_out = torch.full((1,), LEFT_OUT, device=pl_module.device)
        self._metrics.update(nothing, left_out)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._metrics is not None:
            probabilities = outputs["logits"].float().softmax(dim=1)
            self._metrics.update(probabilities, outputs["classes"])

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._metrics is None or getattr(trainer, "fast_dev_run", False):
            return
        found = self._metrics.compute()  # all ranks: it gathers from them
        bins = found["bins"].cpu()
        if trainer.is_global_zero and float(bins[0].sum()):
            error = float(found["error"])
            log_scalars(trainer, {"simulation/calibration_error": error})
            save_figure(trainer, draw_calibration(bins, error), "calibration")


class ReliabilityBins(Metric):
    """Images, right answers and summed confidence in each of equal bins: [3, bins] float32.

    A confidence on an edge belongs to the bin above it, as in torchmetrics; 1 to the last bin,
    where torchmetrics has one of its own for it.
    """

    full_state_update = False
    totals: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", default=torch.zeros(3, NUM_BINS), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, classes: Tensor) -> None:
        """Count a batch: probabilities [B, K], true classes [B]."""
        confidences, predicted = probabilities.max(dim=1)
        counts = (classes != LEFT_OUT).float()
        place = (confidences * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        right = (predicted == classes).float() * counts
        # A product, since weighted bincounts wait for a GPU, and their order is up to it.
        values = torch.stack([counts, right, confidences * counts])  # [3, B]
        self.totals += values @ torch.nn.functional.one_hot(place, NUM_BINS).float()

    def compute(self) -> Tensor:
        """[3, bins]."""
        return self.totals


def draw_calibration(bins: Tensor, error: float) -> Figure:
    """Share of right answers over confidence, and how often each confidence occurs."""
    counts, right, confidence = bins
    used = counts > 0
    total = float(counts.sum())
    centres = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS * 100
    figure = new_figure(900, 900)
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 100], [0, 100], color=DARK, linewidth=1, linestyle="--", label="as sure as right")
    accuracy = 100 * right[used] / counts[used]
    top.bar(
        centres[used].tolist(),
        accuracy.tolist(),
        0.92 * 100 / NUM_BINS,
        color=BLUE,
        alpha=0.35,
    )
    mean_confidence = 100 * confidence[used] / counts[used]
    top.plot(
        mean_confidence.tolist(),
        accuracy.tolist(),
        color=BLUE,
        marker="o",
        markersize=4,
        linewidth=1.5,
        label="the model",
    )
    top.set_ylim(0, 104)
    top.set_ylabel("right answers (%)", fontsize=9)
    top.legend(fontsize=8, frameon=False, loc="upper left")
    low.bar(centres.tolist(), (100 * counts / total).tolist(), 0.92 * 100 / NUM_BINS, color=GREY)
    low.set_ylabel("test images (%)", fontsize=9)
    low.set_xlabel("confidence in the most probable class (%)", fontsize=9)
    low.set_xlim(0, 100)
    for axes in (top, low):
        plain_axes(axes)
        axes.grid(axis="y", color="#e4e7ea", linewidth=0.7)
        axes.set_axisbelow(True)
    gap = float(confidence.sum() - right.sum()) / total
    side = "above" if gap > 0 else "below"
    figure.suptitle(
        f"simulation: expected calibration error {100 * error:.1f} %, {total:,.0f} test images\n"
        f"on average its confidence is {100 * abs(gap):.1f} points {side} its accuracy",
        fontsize=10,
    )
    return figure
