"""Where training starts: a fresh head on known features, or a model that was delivered before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ecos_pl.backbone import WeightsError
from ecos_pl.classifier import Classifier
from ecos_pl.model_file import is_model_file, load_model


def new_classifier(
    classes: Sequence[str], *, backbone: str, weights: str = "auto", image_size: int, seed: int = 0
) -> Classifier:
    """Make the classifier that a training starts from.

    A ``model.safetensors`` of an earlier run gives its backbone, and its head too if it tells the
    same classes apart; every other source of weights is ``backbone.create_backbone``'s.

    Args:
        classes: Names of the K classes.
        backbone: timm architecture.
        weights: ``auto``, ``packaged``, ``pretrained``, ``random``, or a file.
        image_size: Input side in pixels.
        seed: Of what is initialised at random.

    Raises:
        WeightsError: The weights are missing, damaged, or of another architecture.
    """
    path = Path(weights).expanduser()
    if not is_model_file(path):
        return Classifier.create(
            classes, backbone=backbone, weights=weights, image_size=image_size, seed=seed
        )
    try:
        delivered = load_model(path)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    if delivered.backbone != backbone:
        raise WeightsError(
            f"{path} holds a {delivered.backbone}, not a {backbone}: write "
            f"task.backbone={delivered.backbone}"
        )
    if delivered.classes == list(classes) and delivered.image_size == image_size:
        return delivered.train()
    return Classifier.create(
        classes, backbone=backbone, weights=weights, image_size=image_size, seed=seed
    )
