"""How good the proxy set is, against a random one of the same size."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from callbacks.logging_to import log_scalars, log_table
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.storage import fingerprint_of, read_json, write_json

if TYPE_CHECKING:
    from ecos_pl.quality.measure import Table, Truth

log = logging.getLogger(__name__)

_VERSION = 1  # raise when a change alters a measure


class ProxyQuality(ShowsProbe):
    """Logs ``quality/…`` and ``simulation/quality/…`` of the probe; see ``docs/quality.md``.

    Any logger gets ``NAME`` of the proxy set and ``random/NAME`` of a random set, and a table of
    both. Measured once for each probe: the numbers lie in the cache beside the probe's.
    """

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not read_quality(datamodule):
            with isolate_rng():  # whether it was on disk must not change the training
                _measure(datamodule, trainer.strategy.root_device)
        quality = read_quality(datamodule)
        if not quality:
            return
        groups = {"quality": quality["quality"], "simulation/quality": quality["simulation"]}
        scalars = [_scalars(group, table) for group, table in groups.items()]
        log_scalars(trainer, {**scalars[0], **scalars[1]})
        for group, table in groups.items():
            log_table(trainer, f"{group}/against_random", *_rows(table))


def read_quality(datamodule: Any) -> dict[str, Table]:
    """What was measured of the datamodule's probe: ``quality`` and ``simulation``.

    Nothing where there was no probe, or where nobody has measured it.
    """
    if getattr(datamodule, "probe_result", None) is None:
        return {}
    path = _path(datamodule)
    return dict(read_json(path)) if path.is_file() else {}


def _path(datamodule: Any) -> Path:
    scenario, test = datamodule.scenario, datamodule.scenario.client_test
    facts = {
        "version": _VERSION,
        "probe": datamodule.probe_result.fingerprint,
        "client": None if test is None else test.fingerprint,
        "simulated": scenario.client_train is not None,
        "domain": scenario.client_domain,
        "seed": datamodule.seed,
    }
    return Path(datamodule.cache_dir) / "quality" / f"{fingerprint_of(facts)[:16]}.json"


def _measure(datamodule: Any, device: torch.device) -> None:
    from ecos_pl.quality.measure import ProxyMeasures

    on_disk = datamodule.pool_on_disk()
    if on_disk is None:
        log.warning(
            "the proxy set's quality is unknown: the pool's embeddings are gone from the cache"
        )
        return
    if device.type == "mps":  # sums are in float64, which Apple's GPUs lack
        device = torch.device("cpu")
    plan = datamodule.plan
    measures = ProxyMeasures(*on_disk, plan.duplicate_distance, datamodule.seed, device)
    chosen = datamodule.probe_result.indices.numpy()
    public, simulated = measures.against_random(chosen, _truth(datamodule, device))
    write_json(_path(datamodule), {"quality": public, "simulation": simulated})


def _truth(datamodule: Any, device: torch.device) -> Truth | None:
    """What only a simulated client tells; None if the client is elsewhere."""
    from ecos_pl.quality.client_images import client_embeddings
    from ecos_pl.quality.measure import Truth

    scenario = datamodule.scenario
    if scenario.client_train is None:
        return None
    client = None
    if scenario.client_test is not None:
        client = client_embeddings(
            scenario.client_test, datamodule.plan.encoder, seed=datamodule.seed, device=device
        )
    return Truth(scenario.pool, scenario.classes, scenario.client_domain, client)


def _scalars(group: str, table: Table) -> dict[str, float]:
    prefixes = {"proxy_set": group, "random": f"{group}/random"}
    return {
        f"{prefix}/{name}": value
        for name, values in table.items()
        for which, prefix in prefixes.items()
        if (value := values[which]) is not None
    }


def _rows(table: Mapping[str, Mapping[str, float | None]]) -> tuple[list[str], list[list[Any]]]:
    columns = ["metric", "proxy set", "random"]
    return columns, [[name, one["proxy_set"], one["random"]] for name, one in table.items()]
