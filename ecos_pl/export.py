"""A classifier as files that run elsewhere: ``torch.export`` (.pt2) and ONNX.

Both take images [B, 3, S, S] uint8 of any B and give scores [B, K] float32: pixels are normalised
inside, and the class names travel along.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecos_pl.classifier import Classifier
from ecos_pl.extras import require
from ecos_pl.model_file import header_of

INPUT, OUTPUT = "images", "scores"
METADATA_KEY = "ecos_pl"
"""Where a file holds what ``model_file.header_of`` says of the model, as JSON."""

_OPSET = 20


class _Portable(nn.Module):
    """A classifier's arithmetic with tensors laid out as every runtime has them."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.net = copy.deepcopy(model.net).cpu().float().to(memory_format=torch.contiguous_format)
        for name in ("mean", "std"):
            self.register_buffer(name, model.get_buffer(name).detach().cpu().float().clone())

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.net((images.to(torch.float32) - self.mean) / self.std)
        return scores


def exported(model: Classifier) -> torch.export.ExportedProgram:
    """The model's arithmetic in eval mode as a graph, for any number of images."""
    portable = _Portable(model).eval()
    size = model.image_size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # 2, as 1 would be taken for fixed
    with _quiet():
        return torch.export.export(
            portable, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )


def write_pt2(path: Path, model: Classifier, program: torch.export.ExportedProgram) -> None:
    """Write what ``torch.export.load`` reads; the header is its extra file ``ecos_pl``."""
    header = json.dumps(header_of(model), ensure_ascii=False)
    with _quiet():
        torch.export.save(program, path, extra_files={METADATA_KEY: header})


def write_onnx(path: Path, model: Classifier, program: torch.export.ExportedProgram) -> None:
    """Write the float ONNX file.

    Raises:
        ValueError: The packages for it are missing.
    """
    require("compress")
    import onnx

    with _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=_OPSET,
            verbose=False,
        )
        assert made is not None
        made.save(str(path))
    graph = onnx.load(path)
    onnx.save(with_header(graph, model), path)


def with_header(graph: Any, model: Classifier) -> Any:
    """The ONNX model, telling whose it is and what its scores mean."""
    del graph.metadata_props[:]
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(header_of(model), ensure_ascii=False)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress lines and warnings about their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
