"""Packages that only some runs need: told in one line where they are missing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

MODULES = {
    "compress": ("torch_pruning", "onnx", "onnxruntime", "onnxscript"),
}
"""What an extra of pyproject.toml brings, as modules."""


def require(extra: str, modules: Sequence[str] | None = None) -> None:
    """Import an extra's modules, or say how to install them.

    Raises:
        ValueError: One of them is missing.
    """
    for name in modules if modules is not None else MODULES[extra]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            package = (error.name or name).partition(".")[0].replace("_", "-")
            raise ValueError(
                f'this needs the package {package}: pip install -e ".[{extra}]"'
            ) from error
