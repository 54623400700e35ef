"""Int8 after training: an ONNX file with 8-bit weights and activations (static QDQ).

Weights are scaled per output channel; the ranges of activations are calibrated on images.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecos_pl.classifier import Classifier
from ecos_pl.export import INPUT, with_header
from ecos_pl.extras import require
from ecos_pl.onnx_run import open_session, scores_of

METHODS = ("minmax", "percentile")
"""How the range of an activation follows from the values seen on calibration images: all of them,
or all but the outermost. (ONNX Runtime's entropy method compares no range but the whole one, with
as many bins as quantize_static lets it have: it is minmax.)"""

_PERCENTILE = 99.99  # of values that fall into the range

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Recipe:
    """How a model was quantised.

    Attributes:
        method: One of ``METHODS``.
        float_ends: The first convolution and the last layer stay in float.
    """

    method: str
    float_ends: bool = False

    def __str__(self) -> str:
        return self.method + (", first and last layer in float" if self.float_ends else "")


@dataclass(frozen=True)
class Quantised:
    """A quantised file and how well it agrees with the float one on held-out images.

    Attributes:
        recipe: How it was made.
        agreement: Share of held-out images with the same highest score.
        deviation: Mean absolute difference of the scores.
    """

    recipe: Recipe
    agreement: float
    deviation: float


def quantise(source: Path, target: Path, model: Classifier, images: Tensor, recipe: Recipe) -> None:
    """Write the int8 version of a float ONNX file.

    Args:
        source: From ``export.write_onnx``.
        target: The file to write.
        model: What it holds; for the header.
        images: To calibrate on, [N, 3, S, S] uint8.
        recipe: How.
    """
    require("compress")
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = quantization.CalibrationMethod
    kind = {"minmax": methods.MinMax, "percentile": methods.Percentile}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        folded = Path(folder) / "folded.onnx"  # batch norms become part of the convolutions
        quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
        weighted = [n for n in onnx.load(folded).graph.node if n.op_type in ("Conv", "Gemm")]
        ends = [weighted[0].name, weighted[-1].name] if recipe.float_ends else []
        quantization.quantize_static(
            str(folded),
            str(target),
            _reader(images),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=ends,
            calibrate_method=kind[recipe.method],
            extra_options={"CalibTensorRangeSymmetric": False, "CalibPercentile": _PERCENTILE},
        )
    onnx.save(with_header(onnx.load(target), model), target)


def best_quantised(
    source: Path,
    folder: Path,
    model: Classifier,
    calibration: Tensor,
    held_out: Tensor,
    *,
    methods: Sequence[str],
    tolerance: float,
) -> tuple[Path, list[Quantised]]:
    """Quantise in several ways and keep the one closest to the float file on held-out images.

    The first and the last layer are kept in float, which costs size and time, only where every
    way without that disagrees on more than the tolerance.

    Args:
        source: The float ONNX file.
        folder: Where to write the candidates.
        model: What the file holds.
        calibration: Images to calibrate on.
        held_out: Other images, to compare on.
        methods: Of ``METHODS``.
        tolerance: Share of held-out images on which the highest scores may differ.

    Returns:
        The best file, and all candidates, best first.
    """
    wanted = scores_of(open_session(source), held_out)
    found: list[tuple[Quantised, Path]] = []
    for float_ends in (False, True):
        for method in methods:
            recipe = Recipe(method, float_ends)
            path = folder / f"{method}{'-float-ends' * float_ends}.onnx"
            quantise(source, path, model, calibration, recipe)
            scores = scores_of(open_session(path), held_out)
            same = (scores.argmax(dim=1) == wanted.argmax(dim=1)).float().mean()
            deviation = (scores - wanted).abs().mean()
            found.append((Quantised(recipe, float(same), float(deviation)), path))
        found.sort(key=lambda one: (-one[0].agreement, one[0].deviation))
        if found[0][0].agreement >= 1 - tolerance:
            break
    return found[0][1], [one for one, _ in found]


def _reader(images: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            size = min(_BATCH_SIZE, len(images))  # equally long ones only, say the histograms
            self.parts = iter(torch.split(images[: len(images) // size * size], size))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.parts, None)
            return None if part is None else {INPUT: part.numpy()}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's remarks, on the root logger and printed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
