"""Pickled NumPy arrays, read without running what else a pickle may hold.

A pickle is a program: it names functions of any installed package and calls them. This reader knows
the few that put arrays together and refuses every other name. It is still a smaller risk, not
none (NumPy's own code parses what the file says), so callers ask their user first.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),  # how Python 3 writes bytes in the protocols of Python 2
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # its name before NumPy 2
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it names {module}.{name}, which is no part of an array: not run")
        return super().find_class(module, name)


def load_arrays(path: Path) -> Any:
    """Read a pickle that holds NumPy arrays, numbers, text, tuples, lists and dicts only.

    Raises:
        ValueError: It names anything else.
        Exception: It is damaged; `pickle` and NumPy raise what they like.
    """
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()
