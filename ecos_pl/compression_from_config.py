"""From the options ``task=compression`` to its models, its target, its module, its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ecos_pl.classifier import Classifier
from ecos_pl.compression_run import Calibration, compressed
from ecos_pl.config import CompressionOptions, Config
from ecos_pl.model_card import card_text
from ecos_pl.model_file import load_model
from ecos_pl.overrides import ConfigError
from ecos_pl.pruning_plan import Target
from ecos_pl.storage import write_bytes


def compression_results(
    config: Config,
    task: CompressionOptions,
    folder: Path,
    module: Any,
    *,
    images: Callable[..., tuple[Tensor, Tensor]],
    test_batches: Callable[[], Any],
) -> dict[str, Any]:
    """Write the compressed model's files, unless they are there; on a dry run, forget them.

    Args:
        config: Of the run.
        task: Its options.
        folder: Of the run.
        module: Which has been trained.
        images: So many proxy images to calibrate on, and others to compare on.
        test_batches: The simulated client's test images; None if there are none.

    Raises:
        ConfigError: Training ended before the last pruning.
    """
    if module.num_pruned < module.num_prunings:
        raise ConfigError(
            f"training ended after {module.num_pruned} of {module.num_prunings} prunings, short of "
            "task.target; its checkpoint stays: allow more steps, or fewer task.num_prunings"
        )
    return compressed(
        None if config.trainer.fast_dev_run else folder,
        module.model,
        module.teacher,
        before=compression_model(task, "weights"),
        target=compression_target(task),
        how=Calibration(task.calibration, task.num_calibration_images, task.tolerance),
        images=images,
        test_batches=test_batches,
    )


def write_card(
    config: Config,
    task: CompressionOptions,
    classes: Sequence[str],
    folder: Path,
    summary: dict[str, Any],
) -> None:
    """Write ``CARD.md`` beside the files: from what they come, and what they are worth."""
    text = card_text(
        summary,
        teacher="/".join(Path(task.teacher).parts[-2:]),  # the card may travel: no path of here
        target=f"task.target.{compression_target(task)}",
        strategy=config.selection.strategy,
        classes=classes,
    )
    write_bytes(folder / "CARD.md", text.encode())


def compression_model(task: CompressionOptions, key: str) -> Classifier:
    """The ``teacher``, or what training starts from: the ``weights``.

    Raises:
        ConfigError: That file cannot be read.
    """
    try:
        return load_model(compression_file(task, key))
    except ValueError as error:
        raise ConfigError(f"task.{key}: {error}") from error


def compression_file(task: CompressionOptions, key: str) -> Path:
    """Where that model is; without ``weights`` the teacher's place."""
    file = task.weights if key == "weights" and task.weights else task.teacher
    return Path(file).expanduser()


def compression_target(task: CompressionOptions) -> Target:
    """What is asked for.

    Raises:
        ConfigError: More than one thing is.
    """
    given = {name: value for name, value in asdict(task.target).items() if value is not None}
    if len(given) > 1:
        keys = " and ".join(f"task.target.{name}" for name in given)
        raise ConfigError(f"{keys} are two targets: give one of them")
    return Target(*next(iter(given.items()), ("sparsity", 0.75)))
