"""A compressed model in every form it is used in, each read back and compared before it counts.

``model.safetensors`` (this project and the client), ``model.pt2`` (PyTorch), ``model.onnx`` and
``model.int8.onnx`` (any ONNX runtime).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecos_pl.classifier import Classifier
from ecos_pl.export import exported, write_onnx, write_pt2
from ecos_pl.model_file import load_model, save_model
from ecos_pl.model_size import macs, parameter_count
from ecos_pl.onnx_run import accuracy_of, latencies_ms, open_session, scores_of
from ecos_pl.quantization import best_quantised

SAFETENSORS, PT2 = "model.safetensors", "model.pt2"
ONNX, INT8 = "model.onnx", "model.int8.onnx"
FILES = (SAFETENSORS, PT2, ONNX, INT8)

FLOAT_TOLERANCE = 1e-3
"""Largest difference of a float file's scores from the model's, relative to the largest score."""

_BATCH_SIZE = 64

Batch = tuple[Tensor, Tensor, Tensor]


def write_files(
    folder: Path,
    student: Classifier,
    teacher: Classifier,
    *,
    calibration: Tensor,
    held_out: Tensor,
    methods: Sequence[str],
    tolerance: float,
    test_batches: Callable[[], Iterable[Batch]],
) -> dict[str, Any]:
    """Write all files and say how they compare with the teacher.

    The teacher is compared as a float32 ONNX file made the same way; both run in ONNX Runtime on
    one CPU thread, one image at a time, in turn within one process.

    Args:
        folder: Where the files come to lie.
        student: The compressed model.
        teacher: What it was made from.
        calibration: Proxy images to calibrate on, [N, 3, S, S] uint8.
        held_out: Other proxy images, on which the files are compared.
        methods: Of calibration, see ``quantization.METHODS``.
        tolerance: See ``quantization.best_quantised``.
        test_batches: Makes the simulated client's test images, as ``onnx_run.accuracy_of`` wants
            them; none where there are none.

    Returns:
        ``compression`` of ``summary.json``: plain data.

    Raises:
        ValueError: A file does not give the model's scores. No file has been replaced then.
    """
    student, teacher = student.cpu().float().eval(), teacher.cpu().float().eval()
    wanted = _in_batches(student, held_out)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".files.") as name:
        aside = Path(name)
        save_model(aside / SAFETENSORS, student)
        program = exported(student)
        write_pt2(aside / PT2, student, program)
        write_onnx(aside / ONNX, student, program)
        int8, tried = best_quantised(
            aside / ONNX,
            aside,
            student,
            calibration,
            held_out,
            methods=methods,
            tolerance=tolerance,
        )
        os.replace(int8, aside / INT8)
        write_onnx(aside / "teacher.onnx", teacher, exported(teacher))

        compared = {SAFETENSORS: _in_batches(load_model(aside / SAFETENSORS), held_out)}
        compared[PT2] = _in_batches(torch.export.load(aside / PT2).module(), held_out)
        sessions = {file: open_session(aside / file) for file in ("teacher.onnx", ONNX, INT8)}
        compared |= {file: scores_of(sessions[file], held_out) for file in (ONNX, INT8)}
        for file in (SAFETENSORS, PT2, ONNX):
            _check(file, compared[file], wanted)

        times = latencies_ms(list(sessions.values()), student.image_size)
        latency = dict(zip(sessions, times, strict=True))
        sizes = {file: _megabytes(aside / file) for file in (*FILES, "teacher.onnx")}
        accuracy = {file: accuracy_of(one, test_batches()) for file, one in sessions.items()}
        for file in FILES:
            os.chmod(aside / file, 0o644)
            os.replace(aside / file, folder / file)
    before, after = accuracy["teacher.onnx"], accuracy[INT8]
    return {
        "size_ratio": sizes["teacher.onnx"] / sizes[INT8],
        "latency_ratio": latency["teacher.onnx"] / latency[INT8],
        "accuracy_drop": None if before is None or after is None else before - after,
        "teacher": {
            **_about(teacher),
            "size_mb": sizes["teacher.onnx"],
            "latency_ms": latency["teacher.onnx"],
            "accuracy": before,
        },
        "student": {
            **_about(student),
            "size_mb": sizes[INT8],
            "latency_ms": latency[INT8],
            "accuracy": after,
            "float_accuracy": accuracy[ONNX],
        },
        "quantisation": [
            {"recipe": str(one.recipe), "agreement": one.agreement, "deviation": one.deviation}
            for one in tried
        ],
        "files": {
            file: {
                "size_mb": sizes[file],
                "latency_ms": latency.get(file),
                "max_deviation": float((compared[file] - wanted).abs().max()),
                "agreement": _agreement(compared[file], wanted),
            }
            for file in FILES
        },
    }


def _check(file: str, scores: Tensor, wanted: Tensor) -> None:
    largest = float((scores - wanted).abs().max())
    allowed = FLOAT_TOLERANCE * max(1.0, float(wanted.abs().max()))
    if not largest <= allowed:  # also where it is not a number
        raise ValueError(
            f"{file} gives other scores than the trained model (they differ by {largest:.2g}, "
            f"allowed {allowed:.2g}); no file was written, the checkpoint stays"
        )


@torch.inference_mode()
def _in_batches(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in torch.split(images, _BATCH_SIZE)]).clone()


def _agreement(scores: Tensor, wanted: Tensor) -> float:
    return float((scores.argmax(dim=1) == wanted.argmax(dim=1)).float().mean())


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def _about(model: Classifier) -> dict[str, Any]:
    return {
        "backbone": model.backbone,
        "image_size": model.image_size,
        "parameters": parameter_count(model.net),
        "macs": macs(model.net, model.image_size),
    }
