"""Making a client's folder, and opening it again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ecos_pl.client import Client
from ecos_pl.client_data import (
    ClientData,
    mark_path,
    new_client_id,
    open_images,
    read_mark,
    units_of,
    write_mark,
)
from ecos_pl.client_policy import ClientPolicy, read_policy, write_policy
from ecos_pl.encoder import EncoderSpec
from ecos_pl.ledger import Ledger
from ecos_pl.private_images import PrivateImages


def set_up(
    folder: Path,
    data: Path,
    policy: ClientPolicy,
    *,
    encoder: EncoderSpec | None,
    test: Path | None = None,
    person_column: str | None = None,
) -> Iterator[str]:
    """Make a client's folder: ``policy.yaml``, ``client.json``, ``ledger.sqlite``.

    The images get a mark with the ledger's name, so that no second ledger is made for them.

    Args:
        folder: Must not exist, or be empty.
        data: The private images: a folder, or a CSV file.
        policy: Without its encoder.
        encoder: The encoder to trust, as it is installed here; None asks about each new one.
        test: Images to evaluate delivered models on.
        person_column: Of the CSV.

    Yields:
        Lines for the person who runs it.

    Raises:
        ValueError: Nothing was made, or what was begun was removed; the text is one line.
    """
    data, test = data.absolute(), test.absolute() if test else None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: a client is never overwritten")
    if (mark := read_mark(data)) is not None:
        raise ValueError(
            f"these images have a ledger already ({mark}, says {mark_path(data)}): a second one "
            "would forget what the first has released"
        )
    source = open_images(data, person_column)
    units_of(source, policy.max_per_person)
    if test is not None:
        open_images(test)
    fingerprint = encoder.fingerprint() if encoder else None
    policy = replace(policy, encoder=encoder, fingerprint=fingerprint)
    labelled = any(label is not None for label in source.labels)
    client_id = new_client_id()
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        Ledger.create(folder / "ledger.sqlite", client_id=client_id)
        write_policy(folder / "policy.yaml", policy)
        marked = write_mark(data, client_id)
        about = ClientData(
            client_id=client_id,
            data=str(data),
            test=str(test) if test else None,
            labelled=labelled,
            person_column=person_column,
            marked=marked,
            max_per_person=policy.max_per_person,
        )
        about.save(folder)
    except BaseException as error:
        for name in ("ledger.sqlite", "policy.yaml", "client.json"):
            (folder / name).unlink(missing_ok=True)
        if read_mark(data) == client_id:
            mark_path(data).unlink()
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"cannot make {folder}: {error.strerror}") from error
        raise
    yield f"made {folder}: {len(source):,} images, {_classes(source.labels)}"
    yield f"read and change {folder / 'policy.yaml'} before you serve"
    if policy.delta * len(source) >= 1:
        yield f"note: δ = {policy.delta:g} is not below 1 / number of images; take less"
    if not labelled:
        yield "note: the images carry no classes, so questions about classes are refused"
    if not marked:
        yield f"note: {data} cannot be written, so another ledger for it would go unnoticed"


def open_client(
    folder: Path, *, device: str = "cpu", batch_size: int = 256, num_workers: int = 0
) -> Client:
    """Open a client's folder.

    Args:
        folder: That `set_up` made.
        device: Where images are embedded.
        batch_size: Images embedded at once.
        num_workers: Processes that decode images.

    Raises:
        ValueError: The folder, the policy or the images are not as they must be.
        LedgerError: The ledger is missing, damaged or another's.
    """
    about = ClientData.load(folder)
    ledger, policy = open_ledger(folder)
    if policy.max_per_person != about.max_per_person:
        if ledger.entries():
            raise ValueError(
                f"max_per_person was {about.max_per_person} when the first answer was given, the "
                f"policy now says {policy.max_per_person}: what was released protects another unit"
            )
        replace(about, max_per_person=policy.max_per_person).save(folder)
    source = about.open()
    images = PrivateImages(
        folder,
        source,
        units=units_of(source, policy.max_per_person),
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    return Client(images, policy, ledger, labelled=about.labelled)


def open_ledger(folder: Path) -> tuple[Ledger, ClientPolicy]:
    """Open a client's ledger alone, and its policy; the errors are those of `open_client`."""
    about = ClientData.load(folder)
    ledger = Ledger.open(folder / "ledger.sqlite", client_id=about.client_id)
    return ledger, read_policy(folder / "policy.yaml")


def _classes(labels: object) -> str:
    assert isinstance(labels, (list, tuple))
    number = len({label for label in labels if label is not None})
    return f"{number} classes" if number else "no classes"
