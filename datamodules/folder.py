"""`data=folder`: the user's own images, a pool folder and a client folder.

The pool may be any tree: `domain/class/x.png`, `class/x.png` or just `x.png`. The client's images
lie in `train/class/x.png` and `test/class/x.png`, or elsewhere, at a client that is asked through
a mailbox: then only the names of its classes are given.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from datamodules.scenario import Scenario
from ecos_pl.images import FolderSource, scan_folder


def remote_client_data(
    pool: Path, classes: Sequence[str], client_domain: str | None = None
) -> Scenario:
    """Scan the pool alone: the client's images are not here.

    Raises:
        ValueError: one line about what is wrong with the folder, the classes or `client_domain`.
    """
    if not classes:
        raise ValueError(
            "with client=mailbox the client's classes must be named: data.classes=[CLASS,CLASS,…]"
        )
    if len(set(classes)) != len(classes):
        raise ValueError("data.classes names a class twice")
    pool_source = scan_folder(Path(pool))
    if client_domain is not None:
        _check_domain(client_domain, pool_source)
    return Scenario("folder", pool_source, None, None, list(classes), client_domain)


def folder_data(pool: Path, client: Path, client_domain: str | None = None) -> Scenario:
    """Scan both folders; the classes are the class folders of `client/train`, sorted.

    Raises:
        ValueError: one line about what is wrong with a folder or with `client_domain`.
    """
    _check_apart(Path(pool), Path(client))
    client_train = _scan_classes(Path(client) / "train")
    client_test = _scan_classes(Path(client) / "test")
    classes = sorted({label for label in client_train.labels if label is not None})
    unknown = {label for label in client_test.labels if label is not None}.difference(classes)
    if unknown:
        raise ValueError(
            f"class {min(unknown)!r} is in {client_test.name!r} but not in {client_train.name!r}:"
            " every class tested needs a folder in train"
        )
    pool_source = scan_folder(Path(pool))
    if client_domain is not None:
        _check_domain(client_domain, pool_source)
    return Scenario("folder", pool_source, client_train, client_test, classes, client_domain)


def _check_apart(pool: Path, client: Path) -> None:
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


def _check_domain(client_domain: str, pool: FolderSource) -> None:
    known = sorted({domain for domain in pool.domains if domain is not None})
    if not known:
        raise ValueError(
            f"client_domain {client_domain!r}: pool {pool.name!r} has no domains, which takes a"
            " tree DOMAIN/CLASS/x.png; leave client_domain out"
        )
    if client_domain not in known:
        near = get_close_matches(client_domain, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        raise ValueError(f"client_domain {client_domain!r} is not in pool {pool.name!r}: {hint}")
