"""Says a thing once, to every logger that can show it.

Scalars reach all loggers; images, tables and histograms W&B and TensorBoard, tables also the run
folder. Rank zero only.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from ecos_pl.storage import write_bytes

_MAX_ROWS_AS_TEXT = 200  # of a table in TensorBoard, which knows no tables


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Log numbers at the trainer's step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=trainer.global_step)


def log_image(trainer: Trainer, name: str, path: Path) -> None:
    """Log a picture that lies in a file."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def log_table(
    trainer: Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Log a table, and write it to ``tables/<name>.csv`` in the run folder.

    Args:
        trainer: Whose loggers and run folder.
        name: As in ``probe/clusters``; the file has "_" for "/".
        columns: Their names.
        rows: Plain values; None where there is nothing to say.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    path = Path(trainer.default_root_dir) / "tables" / f"{name.replace('/', '_')}.csv"
    write_bytes(path, text.getvalue().encode())
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            data = [list(row) for row in rows]
            logger.log_table(name, list(columns), data, step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            log_text(logger, name, markdown_table(columns, rows), trainer.global_step)


def log_histogram(trainer: Trainer, name: str, values: Sequence[float]) -> None:
    """Log how numbers are distributed."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            histogram: Any = wandb.Histogram(list(values))
            logger.log_metrics({name: histogram}, step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            import numpy as np

            logger.experiment.add_histogram(name, np.asarray(values), trainer.global_step)


def log_text(logger: TensorBoardLogger, name: str, text: str, step: int = 0) -> None:
    """Show Markdown in TensorBoard."""
    logger.experiment.add_text(name, text, step)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as text; the end of a long one is left out, and said to be.

    >>> print(markdown_table(["a", "b"], [[1, None], ["x|y", 0.25]]))
    | a | b |
    | --- | --- |
    | 1 |  |
    | x\\|y | 0.25 |
    """
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line(row) for row in rows[:_MAX_ROWS_AS_TEXT]]
    if len(rows) > _MAX_ROWS_AS_TEXT:
        lines.append(f"\n{len(rows) - _MAX_ROWS_AS_TEXT} more rows are in the run folder")
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    texts = ("" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"
