"""The teacher of a distillation: a frozen classifier, from a run before or from timm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecos_pl.backbone import WeightsError, create_backbone, head_size
from ecos_pl.classifier import Classifier
from ecos_pl.model_file import load_model
from ecos_pl.storage import fingerprint_of

_NUM_SHOWN = 5


class FrozenTeacher:
    """A classifier that is asked and never changes.

    Not an ``nn.Module``: the student's module that holds it does not find it among its parts. So it
    is in no checkpoint, no average of weights and no optimizer, no device gathers its gradients,
    and it stays in eval mode whatever mode the student is in. A copy of the student shares it.

    Args:
        model: The classifier; it is frozen.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self

    @property
    def image_size(self) -> int:
        """Side of the images it sees, in pixels."""
        return self.model.image_size

    @property
    def num_features(self) -> int:
        """Dimensions of what its head sees."""
        return self.model.num_features

    def fingerprint(self) -> str:
        """Of everything that determines its answers."""
        model, digest = self.model, hashlib.sha256()
        for name, tensor in model.net.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return fingerprint_of([model.backbone, model.image_size, model.classes, digest.hexdigest()])

    def to(self, device: torch.device | str) -> FrozenTeacher:
        """Move it there."""
        self.model.to(device)
        return self

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [B, K] and features [B, D] of images [B, 3, S, S], pixels from 0 to 255.

        Images of another size are resized first, on their device.
        """
        with torch.no_grad():
            scores: tuple[Tensor, Tensor] = self.model.with_features(
                resized(images, self.model.image_size)
            )
        return scores


def resized(images: Tensor, image_size: int) -> Tensor:
    """Images [B, 3, S, S], pixels from 0 to 255, at another side; bicubic, antialiased.

    They are returned as they are if that is their side; else as float32.
    """
    if images.shape[-1] == image_size:
        return images
    size = (image_size, image_size)
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255)


def delivered_teacher(path: Path, classes: Sequence[str]) -> FrozenTeacher:
    """The ``model.safetensors`` of an earlier run.

    Args:
        path: The file.
        classes: The client's classes, which it must tell apart; in whatever order.

    Raises:
        ValueError: The file is missing or damaged, or its classes are others; one line.
    """
    try:
        model = load_model(path)
    except ValueError as error:
        raise ValueError(f"task.teacher: {error}") from error
    if sorted(model.classes) != sorted(classes):
        raise ValueError(_other_classes(str(path), model.classes, classes))
    rows = [model.classes.index(name) for name in classes]
    return FrozenTeacher(_with_head_rows(model, rows, classes))


def timm_teacher(
    backbone: str, weights: str, image_size: int, classes: Sequence[str]
) -> FrozenTeacher:
    """A timm model with the head it was trained with.

    An ImageNet head that knows all of the client's classes (by a name as in ``tabby``, or by
    WordNet id as in ``n02123045``) is cut down to those. Any other head of as many outputs as the
    client has classes is taken to have them in the client's order, which no weight file says.

    Args:
        backbone: timm architecture.
        weights: See ``backbone.create_backbone``; not ``random``.
        image_size: Side of the images it sees, in pixels.
        classes: The client's classes.

    Raises:
        ValueError: The weights are missing or have no head, or its classes are others; one line.
    """
    if weights == "random":
        raise WeightsError("task.teacher_weights=random: a random teacher knows nothing")
    num_outputs = head_size(backbone, weights)
    names = _imagenet_names(num_outputs)
    rows = _rows_of(classes, names)
    if not names and num_outputs == len(classes):
        rows = list(range(num_outputs))
    if not rows:
        theirs = [one[0] for one in names] or ["without names"] * num_outputs
        raise ValueError(_other_classes(f"{backbone} ({weights})", theirs, classes))
    net = create_backbone(
        backbone, weights, image_size=image_size, num_classes=num_outputs, keep_head=True
    )
    model = Classifier(net, backbone, image_size, [str(k) for k in range(num_outputs)])
    return FrozenTeacher(_with_head_rows(model, rows, classes))


def _with_head_rows(model: Classifier, rows: Sequence[int], classes: Sequence[str]) -> Classifier:
    """The model that tells some of its classes apart, under other names perhaps."""
    model.classes = list(classes)
    head: Any = model.net.get_classifier()  # type: ignore[operator]  # every timm model has it
    if list(rows) == list(range(head.weight.shape[0])):
        return model
    if not isinstance(head, nn.Linear):
        raise ValueError(f"task.teacher: the head of {model.backbone} is no linear layer")
    head.weight = nn.Parameter(head.weight.detach()[rows].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[rows].clone())
    head.out_features = len(rows)
    return model


def _imagenet_names(num_outputs: int) -> list[list[str]]:
    """Names of each output if timm knows an ImageNet subset that has so many; else nothing."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_outputs})
    if not subset:
        return []
    info = ImageNetInfo(subset)
    return [
        [*info.index_to_description(k).split(", "), info.index_to_label_name(k)]
        for k in range(num_outputs)
    ]


def _rows_of(classes: Sequence[str], names: Sequence[Sequence[str]]) -> list[int]:
    """The outputs that bear the classes' names, each one of a single output; else nothing."""
    found: dict[str, set[int]] = {}
    for row, names_of_row in enumerate(names):
        for name in names_of_row:
            found.setdefault(_plain(name), set()).add(row)
    rows = [found.get(_plain(name), set()) for name in classes]
    single = [row for candidates in rows if len(candidates) == 1 for row in candidates]
    return single if len(set(single)) == len(classes) else []


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def _other_classes(what: str, theirs: Sequence[str], classes: Sequence[str]) -> str:
    return (
        f"task.teacher: {what} tells other classes apart ({_shown(theirs)}) than the client's "
        f"({_shown(classes)})"
    )


def _shown(names: Sequence[str]) -> str:
    dots = ", …" if len(names) > _NUM_SHOWN else ""
    return f"{len(names)}: {', '.join(names[:_NUM_SHOWN])}{dots}"
