"""A teacher trained once on what the public pool labels itself, and kept for every later run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from datamodules.loaders import default_workers, image_loader
from datamodules.proxy import LabelledImages
from datamodules.views import Augment
from ecos_pl.backbone import weights_hash
from ecos_pl.classifier import Classifier
from ecos_pl.evaluation import class_numbers
from ecos_pl.images import PoolSource
from ecos_pl.model_file import load_model, save_model
from ecos_pl.modules.self_labeling import SelfLabelingModule
from ecos_pl.storage import fingerprint_of, one_at_a_time
from ecos_pl.teacher import FrozenTeacher

log = logging.getLogger(__name__)

_VERSION = 1  # raise when a change below alters the teacher
_SEED = 0  # one teacher for all seeds of a run


@dataclass(frozen=True)
class TeacherPlan:
    """How a teacher is trained.

    Attributes:
        backbone: timm architecture.
        weights: Where it starts; see ``backbone.create_backbone``.
        image_size: Side of its images in pixels.
        num_steps: Optimizer steps.
        batch_size: Images per step.
        learning_rate: At the peak of the cycle.
        augment: See ``views.make_view``.
        precision: Arithmetic of the steps, Lightning's word.
    """

    backbone: str = "tf_efficientnet_lite0"
    weights: str = "auto"
    image_size: int = 48
    num_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    augment: Augment = "affine"
    precision: str = "32-true"


def public_teacher(
    pool: PoolSource,
    classes: Sequence[str],
    plan: TeacherPlan,
    cache_dir: Path,
    new_trainer: Callable[[Path], L.Trainer],
    *,
    num_workers: int | None = None,
) -> FrozenTeacher:
    """Read the teacher from ``teachers/`` in the cache, or train it on one device.

    Of several processes one trains and the others wait for the file. If it is ended, the next one,
    or the next call, goes on from its last checkpoint. Nothing private is touched.

    Args:
        pool: Those of its images that bear one of the classes as their label are learned from.
        classes: The client's.
        plan: How.
        cache_dir: On a disk that all processes see.
        new_trainer: Makes a Trainer of one device that ends after ``plan.num_steps`` and keeps
            checkpoints in a folder; on a dry run, one that keeps nothing.
        num_workers: Processes that read images.

    Raises:
        ValueError: The pool labels no image of one of the classes; or the weights are missing.
    """
    folder = cache_dir / "teachers"
    with one_at_a_time(folder / "pool.lock"):
        len(pool)  # opening a large one takes long, and leaves an index for the others
    numbers = class_numbers(pool, classes)
    _check(pool, numbers, classes)
    facts = {
        "version": _VERSION,
        "pool": pool.fingerprint,
        "classes": list(classes),
        "weights": weights_hash(plan.backbone, plan.weights),
        **{name: value for name, value in asdict(plan).items() if name != "weights"},
    }
    folder /= fingerprint_of(facts)[:16]
    path = folder / "model.safetensors"
    with one_at_a_time(folder.with_suffix(".lock"), "another process trains the teacher"):
        if not path.is_file():
            with isolate_rng():  # whether it was there must not change the student
                model = _trained(pool, numbers, classes, plan, folder, new_trainer, num_workers)
            if model is not None:
                return FrozenTeacher(model)  # a dry run
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return FrozenTeacher(load_model(path))


def _check(pool: PoolSource, numbers: torch.Tensor, classes: Sequence[str]) -> None:
    there = numbers[numbers >= 0].bincount(minlength=len(classes))
    if missing := [name for name, count in zip(classes, there.tolist(), strict=True) if not count]:
        known = sorted({label for label in pool.labels if label is not None})
        raise ValueError(
            f"task.teacher=public: the pool {pool.name} labels no image as "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''} (it labels: "
            f"{', '.join(known[:10]) or 'nothing'}{', …' if len(known) > 10 else ''}); give "
            "another task.teacher"
        )


def _trained(
    pool: PoolSource,
    numbers: torch.Tensor,
    classes: Sequence[str],
    plan: TeacherPlan,
    folder: Path,
    new_trainer: Callable[[Path], L.Trainer],
    num_workers: int | None,
) -> Classifier | None:
    """Train and keep the teacher; on a dry run, which keeps nothing, return it."""
    L.seed_everything(_SEED, verbose=False)
    trainer = new_trainer(folder)
    model = Classifier.create(
        classes,
        backbone=plan.backbone,
        weights=plan.weights,
        image_size=plan.image_size,
        seed=_SEED,
    )
    module = SelfLabelingModule(
        model,
        learning_rate=plan.learning_rate,
        label_smoothing=0.0,  # it would hide how classes resemble each other (Müller et al. 2019)
    )
    loader = _loader(pool, numbers, len(classes), plan, default_workers(num_workers))
    checkpoints = folder.glob("checkpoints/*.ckpt")
    last = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
    dry = bool(getattr(trainer, "fast_dev_run", False))
    if not dry:
        log.warning("training the teacher, once, on the labelled images of the public pool")
    trainer.fit(module, loader, ckpt_path=last, weights_only=True)
    model.to("cpu")
    if dry:
        return model
    save_model(folder / "model.safetensors", model)
    return None


def _loader(
    pool: PoolSource, numbers: torch.Tensor, num_classes: int, plan: TeacherPlan, num_workers: int
) -> DataLoader[object]:
    rows = torch.nonzero(numbers >= 0).flatten()
    generator = torch.Generator().manual_seed(_SEED)
    # No more than the steps will see.
    rows = rows[torch.randperm(len(rows), generator=generator)[: plan.num_steps * plan.batch_size]]
    targets = torch.nn.functional.one_hot(numbers[rows], num_classes).float()
    images = LabelledImages(
        pool, rows.tolist(), targets, torch.ones(len(rows)), plan.image_size, plan.augment
    )
    return image_loader(images, plan.batch_size, num_workers=num_workers, train=True, seed=_SEED)
