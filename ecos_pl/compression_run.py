"""A compression's results in the run's folder: found once, then read."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ecos_pl.classifier import Classifier
from ecos_pl.compressed_files import FILES, write_files
from ecos_pl.model_size import parameter_count
from ecos_pl.progress import progress_bar
from ecos_pl.pruning_plan import PruningPlan, Target, plan_pruning
from ecos_pl.quantization import METHODS
from ecos_pl.storage import fingerprint_of, read_json, write_json


@dataclass(frozen=True)
class Calibration:
    """How ranges of activations are found.

    Attributes:
        method: One of ``quantization.METHODS``, or ``best``.
        num_images: Images to calibrate on.
        tolerance: Share of held-out images that may be answered otherwise in 8 bits.
    """

    method: str
    num_images: int
    tolerance: float


def kept_plan(
    folder: Path | None, model: Classifier, target: Target, files: Mapping[str, Path]
) -> PruningPlan:
    """How much is pruned: found once, then read, since a latency measured again is another one.

    Args:
        folder: The run's; None keeps nothing.
        model: What is pruned.
        target: What for.
        files: What the run was given, by option: they must not change while it goes on.

    Raises:
        ValueError: One of the files is another one than the run began with, or the target cannot
            be reached; one line.
    """
    digests = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()}
    path = folder / "pruning_plan.json" if folder else None
    if path and path.is_file():
        known = read_json(path)
        for key, digest in digests.items():
            if known[key] != digest:
                raise ValueError(
                    f"{files[key]} is not the file that {folder} began with: choose another "
                    "run_id, or remove that folder"
                )
        return PruningPlan(known["keep"], known["expected"])
    with progress_bar("looking for the widths that meet the target", None, "models") as done:
        plan = plan_pruning(model, target, done)
    if path:
        write_json(path, {**digests, "target": str(target), **asdict(plan)})
    return plan


def compressed(
    folder: Path | None,
    model: Classifier,
    teacher: Classifier,
    *,
    before: Classifier,
    target: Target,
    how: Calibration,
    images: Callable[[int], tuple[Tensor, Tensor]],
    test_batches: Callable[[], Iterable[Any]],
) -> dict[str, Any]:
    """Write a compressed model's files, unless they are there, and say what they are worth.

    Args:
        folder: The run's; None makes them aside and forgets them.
        model: Pruned and healed.
        teacher: What it is compared with.
        before: What was pruned.
        target: What for.
        how: The calibration.
        images: Gives that many images to calibrate on, and others to compare on.
        test_batches: Gives the simulated client's test images; see ``onnx_run.accuracy_of``.

    Returns:
        For ``summary.json``: ``target``, and what ``compressed_files.write_files`` found.
    """
    made_of = fingerprint_of([astuple(how), _weights_hash(model), _weights_hash(teacher)])
    path = folder / "compression.json" if folder else None
    if folder and path and path.is_file() and all((folder / name).is_file() for name in FILES):
        known = read_json(path)
        if known["made_of"] == made_of:
            done: dict[str, Any] = known["found"]
            return done
    calibration, held_out = images(how.num_images)
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = write_files(
            place,
            model,
            teacher,
            calibration=calibration,
            held_out=held_out,
            methods=METHODS if how.method == "best" else [how.method],
            tolerance=how.tolerance,
            test_batches=test_batches,
        )
    removed = 1 - found["student"]["parameters"] / parameter_count(before.net)
    reached = {**found["student"], "sparsity": removed}[target.name]
    asked = {"name": target.name, "value": target.value, "reached": reached}
    found = {"target": asked, **found}
    if path:
        write_json(path, {"made_of": made_of, "found": found})
    return found


def _weights_hash(model: Classifier) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.net.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
