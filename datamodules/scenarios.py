"""From the options `data=…` and `client=…` to a pool and a client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datamodules.client_draw import ClientDraw
from datamodules.scenario import Scenario
from ecos_pl.config import (
    CelebaUtkfaceOptions,
    Cifar10ImageNet32Options,
    Digits5Options,
    DomainNet10Options,
    DomainNetOptions,
    FolderOptions,
    MailboxOptions,
    MnistFashionOptions,
    SimulatedClientOptions,
)
from ecos_pl.images import ImageSource, PoolSource
from ecos_pl.overrides import (
    ConfigError,
    Part,
)


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
    if isinstance(data, (DomainNetOptions, DomainNet10Options)):
        from datamodules.domainnet import domainnet

        return domainnet(
            Path(data.root).expanduser(),
            draw,
            cache_dir=cache_dir,
            ten_classes=isinstance(data, DomainNet10Options),
            allow_pickle=isinstance(data, DomainNet10Options) and data.allow_pickle,
        )
    if isinstance(data, Cifar10ImageNet32Options):
        from datamodules.cifar10_imagenet32 import cifar10_imagenet32

        return cifar10_imagenet32(
            Path(data.root).expanduser(),
            Path(data.imagenet_root).expanduser(),
            draw,
            cache_dir=cache_dir,
            rest_in_pool=data.rest == "pool",
            allow_pickle=data.allow_pickle,
            num_files=data.num_files,
            download=data.download,
        )
    if isinstance(data, CelebaUtkfaceOptions):
        from datamodules.celeba_utkface import celeba_utkface

        return celeba_utkface(
            Path(data.root).expanduser(),
            draw,
            cache_dir=cache_dir,
            target=data.target,
            rest_in_pool=data.rest == "pool",
            has_tiny_imagenet=data.tiny_imagenet,
        )
    if isinstance(data, FolderOptions):
        return _folder_scenario(data, draw, cache_dir=cache_dir)
    from datamodules.mixed_digits import mixed_digits
    from datamodules.narrowed import narrowed

    return mixed_digits() if draw is None else narrowed(mixed_digits(), draw)


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


def _folder_scenario(
    options: FolderOptions, draw: ClientDraw | None, *, cache_dir: Path
) -> Scenario:
    from datamodules.client_spec import NamedClient, apart, named_client
    from datamodules.deferred_pool import DeferredPool
    from datamodules.folder import check_apart, check_domain, folder_data, remote_client_data
    from datamodules.narrowed import narrowed
    from datamodules.pool_spec import folders_of, open_pool

    domain = options.client_domain
    used: tuple[NamedClient, list[ImageSource]] | None = None

    def opened() -> PoolSource:
        pool = open_pool(options.pool, cache_dir=cache_dir, licence=options.licence)
        if domain is not None:
            check_domain(domain, pool)
        return pool if used is None else apart(pool, *used)

    pool = DeferredPool(opened)
    if draw is None:
        return remote_client_data(pool, options.classes, domain)
    if options.client is None:
        raise ConfigError("no value for data.client: write data.client=CLIENT")
    if options.classes:
        raise ConfigError("data.classes: the class folders of data.client name the classes")
    client = named_client(options.client, cache_dir=cache_dir)
    if client is None:
        for folder in folders_of(options.pool):
            check_apart(folder, Path(options.client))
        return narrowed(folder_data(pool, Path(options.client), domain), draw)
    whole = Scenario("folder", pool, client.train, client.test, client.classes, domain)
    scenario = replace(narrowed(whole, draw), repeats_allowed=True)  # public data have some
    assert scenario.client_train is not None
    assert scenario.client_test is not None
    used = client, [scenario.client_train, scenario.client_test]
    return scenario
