"""The transfer set of a distillation: chosen images, labelled or not, and the teacher's answers.

Where every image has a fixed number of views, the teacher is asked about each of them once, and
its answers are kept on disk.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ecos_pl.progress import progress_bar
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.storage import fingerprint_of, write_bytes
from ecos_pl.teacher import FrozenTeacher

_VERSION = 1  # raise when a change below alters views or answers

Item = tuple[Tensor, Tensor, Tensor]


class TransferImages(Dataset[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]):
    """Images as ``(uint8 [3, S, S], target [K], label weight [], weight [], logits [K] or [0])``.

    An image without a label has label weight 0, one that cannot be read has both weights 0.
    ``logits`` are the teacher's, where they are known beforehand.

    Args:
        images: Gives ``(view, target, weight)``; the weight 1 if the image can be read, else 0.
            Views are drawn with torch's global generator.
        label_weights: [n], how much each image's label counts.
        num_views: Fixed views of each image, one of which is drawn each time; None for a new view
            each time.
        seed: Of the fixed views.
        logits: [n, V, K], the teacher's scores of each fixed view.
    """

    def __init__(
        self,
        images: Dataset[Item],
        label_weights: Tensor,
        *,
        num_views: int | None = None,
        seed: int = 0,
        logits: Tensor | None = None,
    ) -> None:
        self.images, self.label_weights = images, label_weights
        self.num_views, self.seed, self.logits = num_views, seed, logits

    def __len__(self) -> int:
        return len(self.label_weights)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = torch.empty(0)
        if self.num_views is None:
            image, target, weight = self.images[position]
        else:
            number = int(torch.randint(self.num_views, ())) if self.num_views > 1 else 0
            image, target, weight = self.view(position, number)
            if self.logits is not None:
                logits = self.logits[position, number]
        return image, target, self.label_weights[position] * weight, weight, logits

    def view(self, position: int, number: int) -> Item:
        """One of an image's fixed views; leaves torch's generator as it was."""
        own = int(fingerprint_of([self.seed, position, number])[:15], 16)
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(own)
        try:
            return self.images[position]
        finally:
            torch.set_rng_state(before)


class _OneView(Dataset[Tensor]):
    """One of the fixed views of some of the images."""

    def __init__(self, images: TransferImages, number: int, positions: range) -> None:
        self.images, self.number, self.positions = images, number, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> Tensor:
        return self.images.view(self.positions[place], self.number)[0]


def teacher_logits(
    teacher: FrozenTeacher,
    images: TransferImages,
    facts: object,
    cache_dir: Path,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The teacher's scores [n, V, K] float32 of all fixed views, made where they are not on disk.

    A file for each view number: what was made before an interruption, or for fewer views, is read.

    Args:
        teacher: Moved to the device.
        images: Of V fixed views each.
        facts: Plain data that determines the views.
        cache_dir: Answers go to ``teacher_logits`` in it; on a disk that all ranks see.
        device: Where the teacher runs.
        batch_size: Images per pass.
        num_workers: Processes that read images.
        ranks: Who shares the work; all of them call this.

    Raises:
        ValueError: A file there is damaged.
    """
    assert images.num_views is not None
    key = fingerprint_of([_VERSION, teacher.fingerprint(), images.seed, facts])
    folder = cache_dir / "teacher_logits" / key[:16]
    mine, found = ranks.block(len(images)), []
    missing = [
        number
        for number in range(images.num_views)
        if not ranks.broadcast(_path(folder, number).is_file())
    ]
    title = "asking the teacher" if missing and ranks.is_first else None
    with progress_bar(title, len(missing) * len(mine), "views") as advance:
        for number in range(images.num_views):
            if number in missing:
                loader = DataLoader(
                    _OneView(images, number, mine), batch_size, num_workers=num_workers
                )
                parts = []
                for views in loader:
                    parts.append(teacher.to(device)(views.to(device))[0].float().cpu())
                    advance(len(views))
                empty = torch.empty(0, len(teacher.model.classes))
                rows = ranks.concat(torch.cat([empty, *parts]))
                if ranks.is_first:
                    write_bytes(_path(folder, number), save({"logits": rows}))
            else:
                rows = _read(_path(folder, number))
            found.append(rows)
    return torch.stack(found, dim=1)


def _path(folder: Path, number: int) -> Path:
    return folder / f"view-{number:04d}.safetensors"


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)["logits"]
    except (OSError, SafetensorError, LookupError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it") from error
