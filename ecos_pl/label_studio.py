"""Label Studio's formats: a labelling interface, tasks to import, and the exports that come back.

Source: https://labelstud.io/guide/task_format (tasks, annotations), /tags/choices (interface), and
the converter of label-studio-sdk for JSON-MIN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from ecos_pl.annotator_votes import Answer

CHOICES = "label"
"""Name of the interface's choices: the key of the answer in JSON-MIN and CSV exports."""

IMAGE_ID = "image_id"
"""The task data's key for an image's id. Not ``id``: JSON-MIN puts the task's own number there."""


def label_config(classes: Sequence[str], other: str) -> str:
    """The labelling interface: an image, and the classes to choose one of."""
    choices = "\n".join(f"    <Choice value={quoteattr(name)}/>" for name in [*classes, other])
    return f"""\
<View>
  <Image name="image" value="$image" zoomControl="true"/>
  <Choices name="{CHOICES}" toName="image" choice="single" required="true" showInline="true">
{choices}
  </Choices>
</View>
"""


def answers_of(record: Any, file: str, job: str) -> Iterator[Answer]:
    """Answers in one record of a JSON or JSON-MIN export.

    Args:
        record: A task with its annotations, or (JSON-MIN) one annotation with its task's data.
        file: Where it stands, for error messages; also the annotator's name where there is none.
        job: The annotation job that it must be of.

    Raises:
        ValueError: It is neither, of another job or interface, or has two answers at once.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{file}: not an export of Label Studio's in the format JSON or JSON-MIN")
    annotations = record.get("annotations", record.get("completions"))  # as before version 1.0
    data = record["data"] if isinstance(record.get("data"), dict) else record
    where = f"{file}, task {record.get('id', '?')}"
    if not isinstance(data.get(IMAGE_ID), str):
        raise ValueError(f"{where}: no {IMAGE_ID}; this is no export of the job's tasks.json")
    check_job(str(data.get("job", job)), job, where)
    given = _full(annotations, where) if isinstance(annotations, list) else _minimal(record)
    for annotator, label in given:
        if isinstance(label, str) and label.strip():
            yield Answer(data[IMAGE_ID], annotator or file, label, where)
        elif label is not None and label != []:
            raise ValueError(f"{where}: not one choice but {label!r}")


def check_job(found: str, job: str, where: str) -> None:
    """Refuse an answer that belongs to another annotation job (ValueError)."""
    if found != job:
        raise ValueError(f"{where}: labels of another annotation job ({found}; this is {job})")


def _full(annotations: Sequence[Any], where: str) -> Iterator[tuple[str, Any]]:
    kept = [one for one in annotations if isinstance(one, dict) and not _is_cancelled(one)]
    # Exports give no order; times are ISO 8601 in UTC, which sort as text.
    for one in sorted(kept, key=lambda one: str(one.get("updated_at") or one.get("created_at"))):
        results = [r for r in one.get("result") or [] if isinstance(r, dict)]
        values = [r.get("value") or {} for r in results if r.get("from_name") == CHOICES]
        if results and not values:
            raise ValueError(
                f"{where}: nothing answers {CHOICES!r}; it was not labelled with the job's "
                "label_config.xml"
            )
        labels = [name for value in values for name in value.get("choices") or []]
        yield _annotator(one.get("completed_by")), labels[0] if len(labels) == 1 else labels


def _is_cancelled(annotation: Mapping[str, Any]) -> bool:
    return bool(annotation.get("was_cancelled") or annotation.get("skipped"))


def _minimal(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    label = record.get(CHOICES)
    if isinstance(label, dict):  # several choices
        label = label.get("choices")
    yield _annotator(record.get("annotator")), label


def _annotator(who: Any) -> str:
    """The same name in every format: a number, or of a user's record the address."""
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return "" if who is None else str(who)
