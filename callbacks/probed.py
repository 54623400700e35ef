"""What the callbacks read from the datamodule, whichever data family made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lightning.pytorch import Trainer

from ecos_pl.images import ImageSource
from ecos_pl.probe_result import ProbeResult


class PublicScenario(Protocol):
    """The public side of a ``datamodules.scenario.Scenario``."""

    @property
    def pool(self) -> ImageSource:
        """The public images."""

    @property
    def client_domain(self) -> str | None:
        """The pool's name for the client's domain; only simulation knows it."""


@dataclass(frozen=True)
class Probed:
    """A probe that has been done, its pool, and what simulation knows about it."""

    result: ProbeResult
    scenario: PublicScenario
    simulation: Mapping[str, float | None]


def probed(trainer: Trainer) -> Probed | None:
    """The datamodule's probe; None on a dry run, and where nothing was asked for or chosen."""
    datamodule = getattr(trainer, "datamodule", None)
    result = getattr(datamodule, "probe_result", None)
    if result is None or getattr(trainer, "fast_dev_run", False):
        return None
    assert datamodule is not None
    return Probed(result, datamodule.scenario, datamodule.simulation)
