"""`data=folder`: the user's own images, a pool folder and a client folder.

The pool may be any tree: `domain/class/x.png`, `class/x.png` or just `x.png`; or any other source
of images. The client's images lie in `train/class/x.png` and `test/class/x.png`, or elsewhere, at
a client that is asked through a mailbox: then only the names of its classes are given.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from datamodules.scenario import Scenario
from ecos_pl.images import FolderSource, PoolSource, scan_folder
from ecos_pl.pool_index import Categories


def remote_client_data(
    pool: Path | PoolSource, classes: Sequence[str], client_domain: str | None = None
) -> Scenario:
    """The pool alone: the client's images are not here.

    Args:
        pool: A folder, which is scanned now, or a source, which is not looked at: whoever opens
            it calls `check_domain`.
        classes: The client's class names.
        client_domain: The pool's name for the client's domain.

    Raises:
        ValueError: one line about what is wrong with the folder, the classes or `client_domain`.
    """
    if not classes:
        raise ValueError(
            "with client=mailbox the client's classes must be named: data.classes=[CLASS,CLASS,…]"
        )
    if len(set(classes)) != len(classes):
        raise ValueError("data.classes names a class twice")
    source = _opened(pool, client_domain)
    return Scenario("folder", source, None, None, list(classes), client_domain)


def folder_data(
    pool: Path | PoolSource, client: Path, client_domain: str | None = None
) -> Scenario:
    """The pool and the client's folder; the classes are the folders of `client/train`, sorted.

    Args:
        pool: A folder, which is scanned now, or a source, which is not looked at: whoever opens
            it calls `check_apart` and `check_domain`.
        client: Folder with `train` and `test`.
        client_domain: The pool's name for the client's domain.

    Raises:
        ValueError: one line about what is wrong with a folder or with `client_domain`.
    """
    if isinstance(pool, Path):
        check_apart(pool, Path(client))
    client_train = _scan_classes(Path(client) / "train")
    client_test = _scan_classes(Path(client) / "test")
    classes = sorted({label for label in client_train.labels if label is not None})
    unknown = {label for label in client_test.labels if label is not None}.difference(classes)
    if unknown:
        raise ValueError(
            f"class {min(unknown)!r} is in {client_test.name!r} but not in {client_train.name!r}:"
            " every class tested needs a folder in train"
        )
    source = _opened(pool, client_domain)
    return Scenario("folder", source, client_train, client_test, classes, client_domain)


def _opened(pool: Path | PoolSource, client_domain: str | None) -> PoolSource:
    if not isinstance(pool, Path):
        return pool
    source = scan_folder(pool)
    if client_domain is not None:
        check_domain(client_domain, source)
    return source


def check_apart(pool: Path, client: Path) -> None:
    """Refuse (ValueError) a pool and a client that lie in one another, or nowhere."""
    for role, path in (("pool", pool), ("client", client)):
        if not path.is_dir():
            raise ValueError(f"{role} folder {str(path)!r} does not exist or is no folder")
    public, private = pool.resolve(), client.resolve()
    if public == private or private in public.parents or public in private.parents:
        raise ValueError(
            f"pool {str(pool)!r} and client {str(client)!r} overlap: the pool is public and the"
            " client private, so neither may lie inside the other"
        )


def _scan_classes(folder: Path) -> FolderSource:
    """Scan a folder where each image lies in a class folder, one level down."""
    if not folder.is_dir():
        raise ValueError(
            f"client folder {str(folder)!r} is missing: the client's images lie in"
            " train/CLASS/x.png and test/CLASS/x.png"
        )
    source = scan_folder(folder)
    for relative in source.ids:
        if relative.count("/") != 1:
            raise ValueError(
                f"{relative!r} in {str(folder)!r} is not directly in a class folder: expected"
                f" {folder.name}/CLASS/{relative.split('/')[-1]}"
            )
    return source


def check_domain(client_domain: str, pool: PoolSource) -> None:
    """Refuse (ValueError) a domain that no image of the pool has."""
    domains = pool.domains
    named = domains.names if isinstance(domains, Categories) else set(domains)
    known = sorted(domain for domain in named if domain is not None)
    if not known:
        raise ValueError(
            f"client_domain {client_domain!r}: pool {pool.name!r} has no domains, which takes a"
            " tree DOMAIN/CLASS/x.png; leave client_domain out"
        )
    if client_domain not in known:
        near = get_close_matches(client_domain, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"client_domain {client_domain!r} is not in pool {pool.name!r}: {hint}")
