"""What becomes of those images of the client's data set that are not the client's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from datamodules.domains import Domain
from datamodules.pool_rows import PoolRows
from datamodules.scenario import Scenario
from datamodules.several_pools import SeveralPools


def without_rest(scenario: Scenario, domains: Sequence[Domain], own: str) -> Scenario:
    """The scenario with a pool of the other domains alone: none of it is in the client's domain.

    Args:
        scenario: Of `domain_scenario`.
        domains: All its domains.
        own: Name of the client's.
    """
    others = [
        (one.name, one.licence, PoolRows(one.train, np.arange(len(one.train)), has_domains=False))
        for one in domains
        if one.name != own
    ]
    return replace(scenario, pool=SeveralPools(others), client_domain=None)


def without_persons_of_client(scenario: Scenario, person_of: Mapping[str, int]) -> Scenario:
    """The scenario without pool images of persons that the client has an image of, too.

    Args:
        scenario: Of `domain_scenario`.
        person_of: Whom an image shows, by its name after the domain's; others show nobody known.
    """
    if scenario.client_train is None:
        return scenario
    pool, domain = scenario.pool, f"{scenario.client_domain}/"

    def person(identifier: str) -> int | None:
        inside = identifier.startswith(domain)
        return person_of.get(identifier[len(domain) :]) if inside else None

    clients = {person(identifier) for identifier in scenario.client_train.ids} - {None}
    keep = [row for row, identifier in enumerate(pool.ids) if person(identifier) not in clients]
    return replace(scenario, pool=PoolRows(pool, np.array(keep, np.int64)))
