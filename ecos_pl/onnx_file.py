"""A delivered classifier as an ONNX file, int8 or float.

The contract: one input ``images``, uint8 [B, 3, S, S] as pictures are (0..255); one output
``scores``, float [B, K]; in the file's metadata, under ``ecos_pl``, the JSON header of
`model_file`. onnxruntime runs it; it is an extra of this project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecos_pl.model_file import FORMAT

MAX_SIDE = 4096


class OnnxModel:
    """Images in, class scores out, computed by onnxruntime on the CPU.

    Attributes:
        backbone: Its architecture, as the file says.
        image_size: Input side S in pixels.
        classes: Names of the K classes.
    """

    def __init__(self, session: Any, header: dict[str, Any]) -> None:
        self._session = session
        self.backbone = str(header["backbone"])
        self.image_size, self.classes = _side(header["image_size"]), list(header["classes"])
        if not self.classes or not all(isinstance(name, str) for name in self.classes):
            raise ValueError("its classes are not named")
        self._check_signature()

    def __call__(self, images: Tensor) -> Tensor:
        """Class scores [B, K] float32 of images [B, 3, S, S] uint8."""
        (scores,) = self._session.run(["scores"], {"images": images.cpu().numpy()})
        return torch.from_numpy(scores).float()

    def _check_signature(self) -> None:
        given = [(i.name, i.type) for i in self._session.get_inputs()]
        if given != [("images", "tensor(uint8)")]:
            raise ValueError(f"its inputs are {given}, not one tensor(uint8) named images")
        if [output.name for output in self._session.get_outputs()] != ["scores"]:
            raise ValueError("its output is not one tensor named scores")
        blank = torch.zeros(2, 3, self.image_size, self.image_size, dtype=torch.uint8)
        shape = tuple(self(blank).shape)
        if shape != (2, len(self.classes)):
            raise ValueError(f"two images get scores of shape {shape}, not (2, classes)")


def load_onnx(path: Path) -> OnnxModel:
    """Read a delivered ONNX model and try it on blank images.

    Raises:
        ValueError: onnxruntime is not installed, or the file is missing, damaged, or holds
            something else; the text is one line.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(
            f"{path.name} is an ONNX model, and onnxruntime is not installed: pip install "
            "onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told in one line below
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        header = json.loads(session.get_modelmeta().custom_metadata_map["ecos_pl"])
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        return OnnxModel(session, header)
    except Exception as error:  # onnxruntime has error types of its own, one for each code
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as a delivered model: {reason}") from error


def _side(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        raise ValueError(f"its image_size is {value!r}")
    return value
