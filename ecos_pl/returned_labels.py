"""Label files as they come back from people: CSV tables and Label Studio's exports."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from ecos_pl.annotator_votes import Answer
from ecos_pl.label_studio import CHOICES, IMAGE_ID, answers_of, check_job

OURS = ("job.json", "tasks.json")
"""Files of an annotation job that hold no answers."""


def read_answers(path: Path, job: str) -> list[Answer]:
    """Answers in a label file, or in all those of a folder, in the order of their names.

    A CSV file has the columns ``image_id`` (or ``id``) and ``label``; rows without a label are
    not answered yet. It may have ``annotator``, and then several rows an image; without that
    column the whole file is one annotator's. A ``job`` must be this one. Label Studio's CSV export
    is such a file.

    Args:
        path: A ``.csv`` or ``.json`` file, or a folder of them; in it, hidden files and those of
            the job itself are passed over.
        job: The annotation job that the labels must belong to.

    Raises:
        ValueError: One line: a file is missing, cannot be read, or belongs to another job.
    """
    if path.is_dir():
        return [answer for file in _label_files(path) for answer in _read(file, job)]
    if not path.exists():
        raise ValueError(f"labels.returned: there is no {path}")
    return list(_read(path, job))


def _label_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in (".csv", ".json")
        and file.name not in OURS
        and not file.name.startswith(".")
    )


def _read(file: Path, job: str) -> Iterator[Answer]:
    read = {".csv": _read_csv, ".json": _read_json}.get(file.suffix.lower())
    if read is None:
        raise ValueError(f"{file}: a label file ends in .csv or .json")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read {file}: {reason}") from error
    return read(text, file, job)


def _read_json(text: str, file: Path, job: str) -> Iterator[Answer]:
    try:
        records = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    for record in records if isinstance(records, list) else [records]:
        yield from answers_of(record, str(file), job)


def _read_csv(text: str, file: Path, job: str) -> Iterator[Answer]:
    header, _, _ = text.partition("\n")
    delimiter = max(",;\t", key=header.count)  # spreadsheets write what their country uses
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        id_column = IMAGE_ID if IMAGE_ID in columns else "id"
        for wanted in (id_column, CHOICES):
            if wanted not in columns:
                listed = ", ".join(columns) or "none"
                raise ValueError(f"{file} has no column {wanted!r} (its columns: {listed})")
        for row in reader:
            label, image_id = (row[CHOICES] or "").strip(), (row[id_column] or "").strip()
            if not label:
                continue
            where = f"{file}, line {reader.line_num}"
            if not image_id:
                raise ValueError(f"{where}: a label without {id_column}")
            check_job((row.get("job") or "").strip() or job, job, where)
            annotator = (row.get("annotator") or "").strip()
            yield Answer(image_id, annotator or str(file), label, where)
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from error
