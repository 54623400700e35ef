"""From the options `data=…` and `client=…` to a pool and a client."""

from __future__ import annotations

from pathlib import Path

from datamodules.client_draw import ClientDraw
from datamodules.scenario import Scenario
from ecos_pl.config import (
    ConfigError,
    Digits5Options,
    FolderOptions,
    MailboxOptions,
    MnistFashionOptions,
    SimulatedClientOptions,
)
from ecos_pl.images import PoolSource
from ecos_pl.overrides import Part


def open_scenario(data: Part, client: Part, *, cache_dir: Path) -> Scenario:
    """Open the data, and cut the client out of them.

    Args:
        data: Options of one data family.
        client: Options of the client: a simulated one is drawn, one in a mailbox is elsewhere.
        cache_dir: Where indices of pools are kept.

    Raises:
        ValueError: One line: data that are missing or damaged, or a client that they do not hold.
    """
    draw = _draw(client)
    if isinstance(data, MnistFashionOptions):
        from datamodules.mnist_fashion import mnist_fashion

        return mnist_fashion(Path(data.root), draw)
    if isinstance(data, Digits5Options):
        from datamodules.digits5 import digits5

        return digits5(
            Path(data.root).expanduser(),
            draw,
            cache_dir=cache_dir,
            domains=data.domains,
            max_per_domain=data.max_per_domain,
            download=data.download,
            allow_pickle=data.allow_pickle,
        )
    from datamodules.narrowed import narrowed

    if isinstance(data, FolderOptions):
        scenario = _folder_scenario(data, is_elsewhere=draw is None, cache_dir=cache_dir)
    else:
        from datamodules.mixed_digits import mixed_digits

        scenario = mixed_digits()
    return scenario if draw is None else narrowed(scenario, draw)


def _draw(client: Part) -> ClientDraw | None:
    """Which images a simulated client has; None for a client elsewhere."""
    if isinstance(client, MailboxOptions):
        return None
    assert isinstance(client, SimulatedClientOptions)
    return ClientDraw(
        domain=client.domain,
        fraction=client.fraction,
        size=client.size,
        classes=tuple(client.classes),
        imbalance=client.imbalance,
        seed=client.seed,
    )


def _folder_scenario(options: FolderOptions, *, is_elsewhere: bool, cache_dir: Path) -> Scenario:
    from datamodules.deferred_pool import DeferredPool
    from datamodules.folder import check_apart, check_domain, folder_data, remote_client_data
    from datamodules.pool_spec import folders_of, open_pool

    domain = options.client_domain

    def opened() -> PoolSource:
        pool = open_pool(options.pool, cache_dir=cache_dir, licence=options.licence)
        if domain is not None:
            check_domain(domain, pool)
        return pool

    pool = DeferredPool(opened)
    if is_elsewhere:
        return remote_client_data(pool, options.classes, domain)
    if options.client is None:
        raise ConfigError("no value for data.client: write data.client=CLIENT")
    if options.classes:
        raise ConfigError("data.classes: the class folders of data.client name the classes")
    for folder in folders_of(options.pool):
        check_apart(folder, Path(options.client))
    return folder_data(pool, Path(options.client), domain)
