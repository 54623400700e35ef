"""The client's private images: where they lie, whose they are, and which ledger counts for them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ecos_pl.csv_source import CsvSource, read_csv_source
from ecos_pl.images import ImageSource, scan_folder
from ecos_pl.privacy import PER_SAMPLE, PrivacyUnits
from ecos_pl.storage import read_json, write_bytes, write_json


@dataclass(frozen=True)
class ClientData:
    """Where a client's images are; kept in ``client.json`` in the client's folder.

    Attributes:
        client_id: Random name (32 hex digits) of these images' ledger, also kept beside the images.
        data: A folder of images (``class/x.png`` or flat), or a CSV file (see `csv_source`).
        test: Images to evaluate delivered models on, likewise; None if there are none.
        labelled: Whether the images carry classes, as declared when the client was set up.
        person_column: Column of the CSV that tells whom an image belongs to.
        marked: Whether the mark beside the images could be written.
        max_per_person: Of the policy when the ledger was begun: what its ε is about.
    """

    client_id: str
    data: str
    test: str | None
    labelled: bool
    person_column: str | None
    marked: bool
    max_per_person: int | None

    def save(self, folder: Path) -> None:
        """Write ``client.json``."""
        write_json(folder / "client.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> ClientData:
        """Read ``client.json`` and check that the images are those of this ledger (ValueError)."""
        path = folder / "client.json"
        if not path.is_file():
            raise ValueError(f"{folder} is no client's folder: ecos-client init makes one")
        values = read_json(path)
        if not isinstance(values, dict) or set(values) != set(cls.__dataclass_fields__):
            raise ValueError(f"{path} is damaged: its names are not those that init wrote")
        found = cls(**values)
        found._check_mark()
        return found

    def open(self) -> ImageSource:
        """List the private images."""
        return open_images(Path(self.data), self.person_column)

    def open_test(self) -> ImageSource:
        """List the test images (ValueError if there are none)."""
        if self.test is None:
            raise ValueError(
                "this client has no test images: ecos-client init DIR --test … names them"
            )
        return open_images(Path(self.test))

    def _check_mark(self) -> None:
        if not self.marked:
            return
        mark = read_mark(Path(self.data))
        if mark is None:
            raise ValueError(
                f"the mark of this client's ledger is missing beside {self.data}; if these are the "
                f"same images, put the line {self.client_id} into {mark_path(Path(self.data))}"
            )
        if mark != self.client_id:
            raise ValueError(
                f"the images at {self.data} belong to another ledger ({mark}): a second one would "
                "forget what the first has released"
            )


def open_images(path: Path, person_column: str | None = None) -> ImageSource:
    """A folder of images, or a CSV file that lists them (ValueError if it is neither)."""
    if path.is_file():
        return read_csv_source(path, person_column=person_column)
    if person_column is not None:
        raise ValueError(f"a person column needs a CSV file, and {str(path)!r} is a folder")
    return scan_folder(path)


def units_of(source: ImageSource, max_per_person: int | None) -> PrivacyUnits:
    """Who counts as one in the guarantee: each image, or each person of a CSV.

    Raises:
        ValueError: ``max_per_person`` is set, and the images tell nothing of persons.
    """
    if max_per_person is None:
        return PER_SAMPLE
    if not isinstance(source, CsvSource) or source.persons is None:
        raise ValueError(
            "max_per_person needs a CSV with a person column: ecos-client init … --person-column"
        )
    _, numbers = np.unique(np.array(source.persons), return_inverse=True)
    owners: npt.NDArray[np.int64] = numbers.astype(np.int64)
    return PrivacyUnits(owners, max_per_person)


def mark_path(data: Path) -> Path:
    """Where the name of the ledger is kept beside the images."""
    return data / ".ecos-client" if data.is_dir() else data.with_name(f".{data.name}.ecos-client")


def read_mark(data: Path) -> str | None:
    """The name of the ledger that counts for these images; None if none was ever made."""
    try:
        return mark_path(data).read_text(encoding="ascii").split()[0]
    except (OSError, ValueError, IndexError):
        return None


def write_mark(data: Path, client_id: str) -> bool:
    """Keep the ledger's name beside the images; False where that folder cannot be written."""
    try:
        write_bytes(mark_path(data), f"{client_id}\n".encode())
    except OSError:
        return False
    return True


def new_client_id() -> str:
    """A fresh random name."""
    return os.urandom(16).hex()
