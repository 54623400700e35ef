"""How the training went, what came of it, and the model it left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ecos_pl.report.blocks import Block, Fact, Facts, Side, Source, Table, Text
from ecos_pl.report.curves import curves
from ecos_pl.report.pictures import Figures
from ecos_pl.report.run_record import RunRecord
from ecos_pl.report.words import number, percent

_MAX_ROWS = 16  # longer tables are folded away


def training(record: RunRecord, figures: Figures) -> list[Block]:
    """Blocks of the section on the training: curves, and rounds of labels."""
    charts = curves(record.folder / "metrics", record.fact("simulation", "test_accuracy"))
    blocks: list[Block] = [Side(charts)] if charts else []
    if not charts and (picture := figures.take("training")) is not None:
        blocks.append(picture)
    return [*blocks, *_rounds(record)]


def _rounds(record: RunRecord) -> list[Block]:
    found = record.fact("rounds") or ()
    if not found:
        return []
    header = ["round", "before epoch", "labels changed", "right labels (simulation)"]
    rows: list[Sequence[str]] = [
        (
            f"{place}",
            f"{one['epoch']:,}",
            percent(one["changed"]),
            percent(one.get("label_accuracy")),
        )
        for place, one in enumerate(found, 1)
    ]
    if all(one.get("label_accuracy") is None for one in found):
        header, rows = header[:-1], [row[:-1] for row in rows]
    note = (
        "After some training the client was asked once more, in terms of the network trained so "
        "far, and the labels were set anew. An epoch is one pass over the chosen images."
    )
    return [Table("Further rounds of labels", header, rows, note)]


def result(record: RunRecord, figures: Figures) -> list[Block]:
    """Blocks of the section on the result."""
    known = record.fact("simulation") or {}
    facts = []
    if known.get("test_accuracy") is not None:
        facts.append(
            Fact(
                "Test accuracy",
                percent(known["test_accuracy"], 2),
                "of the client's test images, which no training has seen, are named correctly",
                simulated=True,
            )
        )
    if record.fact("teacher", "test_accuracy") is not None:
        facts.append(
            Fact(
                "The teacher's test accuracy",
                percent(record.fact("teacher", "test_accuracy"), 2),
                "of the network that the student was taught by, on the same images",
                simulated=True,
            )
        )
    per_class = known.get("class_accuracy") or {}
    blocks: list[Block] = [Facts(facts)] if facts else []
    if per_class:
        rows = [(name, percent(value)) for name, value in per_class.items()]
        shares = [value or 0.0 for value in per_class.values()]
        caption, folded = "Test accuracy by class", len(rows) > _MAX_ROWS
        blocks.append(
            Table(
                caption,
                ["class", "accuracy"],
                rows,
                simulated=True,
                shares=shares,
                folded=folded,
            )
        )
    pictures = [p for one in ("confusion_matrix", "calibration") if (p := figures.take(one))]
    return [*blocks, *([Side(pictures)] if pictures else [])]


def model(record: RunRecord) -> list[Block]:
    """Blocks of the section on the model."""
    if found := record.fact("compression"):
        return _compressed(record, found)
    student, teacher = record.fact("model"), record.fact("teacher")
    if not student:
        return []
    if teacher:
        networks = ("network", teacher["backbone"], student["backbone"], "")
        rows = [networks, *_sizes(teacher, student)]
        return [Table("Teacher and student", ["", "teacher", "student", ""], rows, _SIZE_NOTE)]
    facts = [Fact("Network", student["backbone"])]
    facts += [Fact(name.capitalize(), value) for name, value, *_ in _sizes(student, student)]
    return [Facts(facts), Text(_SIZE_NOTE)]


_SIZE_NOTE = (
    "Parameters are the numbers that training sets. Multiply-adds and time are for one image, on "
    "the machine of the run."
)


def _sizes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, key, form, words in (
        ("image size", "image_size", "{:,} px", ""),
        ("parameters", "parameters", "{:,}", "fewer"),
        ("size", "size_mb", "{:.2f} MB", "smaller"),
        ("multiply-adds", "macs", "{:,}", "fewer"),
        ("time for an image", "latency_ms", "{:.2f} ms", "faster"),
    ):
        if before.get(key) is None or after.get(key) is None:
            continue
        ratio = before[key] / after[key] if after[key] else 0
        by = f"{ratio:.1f}× {words}" if words and ratio > 1 else ""
        rows.append((name, form.format(before[key]), form.format(after[key]), by))
    return rows


def _compressed(record: RunRecord, found: dict[str, Any]) -> list[Block]:
    before, after, target = found["teacher"], found["student"], found["target"]
    rows = [("network", before["backbone"], after["backbone"], ""), *_sizes(before, after)]
    if before.get("accuracy") is not None and after.get("accuracy") is not None:
        drop = 100 * found["accuracy_drop"]
        rows.append(
            (
                "test accuracy (simulation)",
                percent(before["accuracy"], 2),
                percent(after["accuracy"], 2),
                f"{drop:.2f} points lower" if drop > 0 else f"{-drop:.2f} points higher",
            )
        )
    wanted = "sparsity (share of parameters removed)" if target["name"] == "sparsity" else ""
    files = [
        (
            name,
            f"{one['size_mb']:.2f}",
            "–" if one["latency_ms"] is None else f"{one['latency_ms']:.2f}",
            f"{one['max_deviation']:.2g}",
            percent(one["agreement"], 2),
        )
        for name, one in found["files"].items()
    ]
    return [
        Table(
            "Before and after",
            ["", "teacher", "compressed", ""],
            rows,
            "The teacher as 32-bit ONNX file, the compressed network as 8-bit one; time for one "
            "image on one CPU thread.",
        ),
        Facts(
            [
                Fact(
                    "Asked for",
                    f"{target['name']} {number(target['value'])}",
                    f"{wanted}; reached {number(target['reached'])}".strip("; "),
                )
            ]
        ),
        Table(
            "Files of the compressed network",
            ["file", "MB", "ms an image", "largest difference", "same class"],
            files,
            "Differences are from the trained network's scores, on images held out of training.",
        ),
        *([Source("The model's card (CARD.md)", record.card)] if record.card else []),
    ]
