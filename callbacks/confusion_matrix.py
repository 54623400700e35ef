"""Which classes of the client's test images are taken for which: a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from typing_extensions import override

from callbacks.figures import DARK, new_figure, save_figure
from callbacks.logging_to import log_scalars, log_table
from ecos_pl.modules.scores import LEFT_OUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("class", "test images", "accuracy", "precision", "most often taken for")
_MOST_NUMBERS = 12  # classes up to which cells bear numbers
_MOST_NAMES = 40  # classes up to which all are named on the axes
_NAME_LENGTH = 14  # letters


class ConfusionMatrix(Callback):
    """Writes ``figures/confusion_matrix.png`` and the table ``simulation/classes`` after a test.

    Tests run in simulations alone: the test images of a real client are not here.

    Attributes:
        class_accuracy: By class, of the last test; without classes that had no image.
    """

    def __init__(self) -> None:
        self.class_accuracy: dict[str, float] = {}
        self._metric: MulticlassConfusionMatrix | None = None
        self._classes: Sequence[str] = ()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all ranks, also on one that gets no image: they add up together.
        self._classes = classes_of(pl_module)
        self._metric = None
        if self._classes:
            self._metric = MulticlassConfusionMatrix(
                len(self._classes), ignore_index=LEFT_OUT, validate_args=False
            ).to(pl_module.device)

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
        if self._metric is not None:
            self._metric.update(outputs["logits"], outputs["classes"])

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._metric is None or getattr(trainer, "fast_dev_run", False):
            return
        matrix = self._metric.compute().cpu()  # all ranks: it sums over them
        if not trainer.is_global_zero or not int(matrix.sum()):
            return
        rows = class_rows(matrix, self._classes)
        self.class_accuracy = {row[0]: row[2] for row in rows if row[2] is not None}
        known = self.class_accuracy.values()
        log_scalars(
            trainer,
            {
                "simulation/mean_class_accuracy": sum(known) / len(known),
                "simulation/worst_class_accuracy": min(known),
            },
        )
        log_table(trainer, "simulation/classes", _COLUMNS, rows)
        save_figure(trainer, draw_confusion(matrix, self._classes), "confusion_matrix")


def classes_of(pl_module: LightningModule) -> Sequence[str]:
    """Names of the classes that a module's model tells apart; none if it has no such model."""
    return getattr(getattr(pl_module, "model", None), "classes", ())


def class_rows(matrix: Tensor, classes: Sequence[str]) -> list[list[Any]]:
    """A row for each class, out of ``matrix`` [true, predicted]; None for what is undefined."""
    rows = []
    for place, name in enumerate(classes):
        right, num_true = int(matrix[place, place]), int(matrix[place].sum())
        num_predicted = int(matrix[:, place].sum())
        wrong = matrix[place].clone()
        wrong[place] = 0
        taken_for = classes[int(wrong.argmax())] if int(wrong.sum()) else None
        accuracy = round(right / num_true, 6) if num_true else None
        precision = round(right / num_predicted, 6) if num_predicted else None
        rows.append([name, num_true, accuracy, precision, taken_for])
    return rows


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """The matrix in percent of each true class."""
    num_classes, total = len(classes), int(matrix.sum())
    shares = 100 * matrix / matrix.sum(dim=1, keepdim=True).clamp_min(1)
    side = max(750, min(1500, 75 * num_classes + 250))
    figure = new_figure(side + 120, side)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    if num_classes <= _MOST_NUMBERS:
        for i in range(num_classes):
            for j in range(num_classes):
                share = float(shares[i, j])
                if matrix[i, j]:
                    text = "<1" if share < 1 else f"{share:.0f}"
                    colour = "white" if share > 55 else DARK
                    axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    ticks = range(0, num_classes, max(1, -(-num_classes // _MOST_NAMES)))
    names = [_short(classes[tick]) for tick in ticks]
    long = max(map(len, names)) > 3
    size = 8 if num_classes <= 20 else 5
    axes.set_xticks(list(ticks), names, fontsize=size, rotation=90 if long else 0, parse_math=False)
    axes.set_yticks(list(ticks), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("% of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    accuracy = 100 * int(matrix.diagonal().sum()) / max(1, total)
    figure.suptitle(f"simulation: {accuracy:.1f} % of {total:,} test images right", fontsize=10)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 6]}…{name[-5:]}"
