"""Of which domains and classes the chosen images are, beside the whole pool. Simulation only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_MAX_NAMES = 1000
"""More names than that are no table that anyone reads."""

Composition = dict[str, dict[str, int]]


def composition(names: Sequence[str | None], chosen: Sequence[int]) -> Composition | None:
    """``chosen`` and ``pool`` images by name; None where the pool knows no names, or too many.

    Args:
        names: [N], of the pool's images: their domains, or their classes.
        chosen: [n], places of the chosen ones.

    >>> composition(["photo", "sketch", "photo"], [0, 2])
    {'photo': {'chosen': 2, 'pool': 2}, 'sketch': {'chosen': 0, 'pool': 1}}
    """
    in_pool = Counter(names)
    if set(in_pool) <= {None} or len(in_pool) > _MAX_NAMES:
        return None
    in_set = Counter(names[place] for place in chosen)
    return {
        name or "(unknown)": {"chosen": in_set[name], "pool": in_pool[name]}
        for name in sorted(in_pool, key=lambda name: (name is None, name))
    }
