"""What was chosen: pictures, regions, domains, labels, sources."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ecos_pl.report.blocks import Block, Fact, Facts, Side, Table
from ecos_pl.report.pictures import Figures
from ecos_pl.report.run_record import RunRecord
from ecos_pl.report.words import counted

_MAX_ROWS = 16  # longer tables are folded away


def chosen(record: RunRecord, figures: Figures) -> list[Block]:
    """Blocks of the section on what was chosen."""
    if not record.has_proxy_set:
        return []
    side = [p for name in ("chosen", "random") if (p := figures.take(name)) is not None]
    counts, rejected, on_map = (
        figures.take(name) for name in ("coverage", "rejected", "embedding_map")
    )
    return [
        *([Side(side)] if side else []),
        Facts(_facts(record)),
        *_beside([*_domains(record), *_labels(record)]),
        *(p for p in (counts, rejected, on_map) if p is not None),
        *_sources(record),
    ]


def _beside(tables: list[Table]) -> list[Block]:
    """Open tables side by side, folded ones below."""
    shown = [table for table in tables if not table.folded]
    return [*([Side(shown)] if shown else []), *(table for table in tables if table.folded)]


def _facts(record: RunRecord) -> list[Fact]:
    proxy = record.fact("proxy")
    facts = [Fact("Chosen images", f"{proxy['size']:,}", f"of {record.pool_size:,} in the pool")]
    if proxy["kept_clusters"] < proxy["num_clusters"]:
        facts.append(
            Fact(
                "Regions kept",
                f"{proxy['kept_clusters']:,} of {proxy['num_clusters']:,}",
                "groups (clusters) of similar public images that images were chosen from",
            )
        )
    for name, key, note in (
        ("Filled up", "filled_up", "chosen beyond those regions, since they held too few"),
        ("Near-duplicates", "duplicates", "left out, since they look like one already chosen"),
        ("Unreadable", "unreadable", "image files of the pool that could not be read"),
    ):
        if proxy.get(key):
            facts.append(Fact(name, counted(proxy[key], "image"), note))
    return facts


def _domains(record: RunRecord) -> list[Table]:
    """Domains of the chosen images, beside what a random choice would hold."""
    found = []
    for key, what in (("chosen_domains", "Domains"), ("chosen_classes", "True classes")):
        if rows := record.fact("simulation", key):
            found.append(_composition(record, f"{what} of the chosen images", rows))
    return found


def _composition(record: RunRecord, caption: str, rows: dict[str, Any]) -> Table:
    size, pool = record.fact("proxy", "size"), sum(row["pool"] for row in rows.values())
    order = sorted(rows, key=lambda name: -rows[name]["chosen"])
    return Table(
        caption,
        ["", "chosen", "in the pool", "a random choice"],
        [
            (
                name,
                f"{rows[name]['chosen']:,}",
                f"{rows[name]['pool']:,}",
                f"{size * rows[name]['pool'] / pool:,.0f}",
            )
            for name in order
        ],
        note="“A random choice” is the number to expect among as many images drawn at random.",
        simulated=True,
        shares=[rows[name]["chosen"] / size for name in order],
        folded=len(rows) > _MAX_ROWS,
    )


def _labels(record: RunRecord) -> list[Table]:
    labels = Counter(record.labels)
    unlabelled = labels.pop("", 0)
    if not labels:
        return []
    rows = [(name, f"{labels[name]:,}") for name in record.classes if labels[name]]
    rows += [(name, f"{n:,}") for name, n in labels.items() if name not in record.classes]
    shares = [labels[row[0]] / max(labels.values()) for row in rows]
    note = f"{counted(unlabelled, 'image')} without a label." if unlabelled else ""
    return [
        Table(
            "Chosen images by label",
            ["label", "images"],
            rows,
            note,
            shares=shares,
            folded=len(rows) > _MAX_ROWS,
        )
    ]


def _sources(record: RunRecord) -> list[Block]:
    rows = [
        (pool["name"], pool["licence"], f"{pool['num_chosen']:,}", f"{pool['num_images']:,}")
        for pool in record.fact("proxy", "pools") or ()
    ]
    if not rows:
        return []
    note = ""
    if any(row[1] == "unknown" for row in rows):
        note = "“unknown”: nobody stated a licence when the pool was named; ask before you publish."
    header = ["collection", "licence", "chosen", "images in all"]
    return [Table("Sources and licences", header, rows, note, words=[1])]
