"""The cloud's checks of an answer: does it fit the question and the plan?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ecos_pl.messages import Answer, MessageError, query_id_of

MAX_COUNT = 2**52
"""Largest integer in an answer: sums of such numbers stay exact in float64."""
MAX_PER_UNIT = 10_000


def check_answer(answer: Answer, query: bytes, *, sample_rate: float) -> None:
    """Check what every answer declares (MessageError).

    Args:
        answer: As it came.
        query: Bytes of the question; its id stands for all it holds, centroids included.
        sample_rate: Asked for; the client may take less, but then its counts are another's.
    """
    if answer.query_id != query_id_of(query):
        raise MessageError("the client answered another question than the one asked")
    if answer.sample_rate != sample_rate:
        raise MessageError(
            f"the client's sample_rate is {answer.sample_rate:g}, the plan says {sample_rate:g}"
        )
    if answer.relation != "add/remove":
        raise MessageError(f"the client's ε is of another kind: {answer.relation!r}")
    if not 1 <= answer.max_per_unit <= MAX_PER_UNIT:
        raise MessageError(f"max_per_unit {answer.max_per_unit} is out of range")


def check_integers(name: str, values: Tensor, shape: Sequence[int]) -> None:
    """Check that these are whole numbers of this shape and of a possible size (MessageError)."""
    if values.dtype != torch.int64 or tuple(values.shape) != tuple(shape):
        wanted = " × ".join(map(str, shape))
        raise MessageError(f"the client must answer {wanted} whole numbers ({name})")
    if bool((values.abs() > MAX_COUNT).any()) or bool((values == -(2**63)).any()):
        raise MessageError(f"the client's {name} are too large to be true")


def check_noise(declared: float, planned: float) -> None:
    """Check that the client's noise is the plan's (MessageError)."""
    if not math.isclose(declared, planned, rel_tol=1e-9):
        raise MessageError(f"the client's noise_std is {declared:g}, the plan says {planned:g}")
