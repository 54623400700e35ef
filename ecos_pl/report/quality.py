"""How good the choice is, beside a random one of the same size."""

from __future__ import annotations

from typing import Any

from ecos_pl.report.blocks import Block, Fact, Facts, Table
from ecos_pl.report.run_record import RunRecord
from ecos_pl.report.words import percent

_MEANINGS = {
    "near_duplicate_rate": "share of images that look like another one; lower is better",
    "cluster_coverage": "share of the regions that images come from",
    "cluster_entropy": "how evenly they are spread over the regions; 1 is even",
    "pool_distance": "how far a public image is from the nearest chosen one, on average",
    "pool_radius": "the same for the public image that is farthest away",
    "purity": "share of images of the client's domain; higher is better",
    "class_share": "share of images of one of the client's classes; higher is better",
    "class_coverage": "share of the client's classes that are there; higher is better",
    "class_coverage_10": "share of the classes that are not nearly missing; higher is better",
    "class_entropy": "how evenly the images are spread over the classes; 1 is even",
    "client_distance": "how far a client's image is from the nearest chosen one; lower is better",
    "joint_radius": "how far the farthest public image is from chosen and client's images",
    "kernel_distance": "how different chosen and client's images are on the whole; 0 is alike",
    "precision": "share of chosen images that could be the client's; higher is better",
    "recall": "share of the client's images that the chosen ones reach; higher is better",
    "density": "how thickly chosen images lie where the client's do; about 1 is alike",
    "coverage": "share of the client's images with a chosen one nearby; higher is better",
}


def quality(record: RunRecord) -> list[Block]:
    """Blocks of the section on how good the choice is."""
    known = record.fact("simulation") or {}
    blocks: list[Block] = []
    if known.get("purity") is not None:
        facts = [
            Fact(
                "Purity",
                percent(known["purity"]),
                "share of the chosen images that are of the client's kind (its domain)",
                simulated=True,
            ),
            Fact(
                "Purity of a random choice",
                percent(known.get("random_purity")),
                "the share among all public images",
                simulated=True,
            ),
        ]
        if known.get("label_accuracy") is not None:
            facts.append(
                Fact(
                    "Right labels",
                    percent(known["label_accuracy"]),
                    "of the chosen images of the client's kind that have a label",
                    simulated=True,
                )
            )
        blocks.append(Facts(facts))
    for found, simulated in (
        (record.fact("quality"), False),
        (record.fact("simulation", "quality"), True),
    ):
        measured = {
            name: one
            for name, one in (found or {}).items()
            if any(value is not None for value in one.values())
        }
        if measured:
            blocks.append(_quality_table(measured, simulated))
    return blocks


def _quality_table(found: dict[str, Any], simulated: bool) -> Table:
    caption = "Measured with the client's data" if simulated else "Measured on public images alone"
    rows = [
        (
            name.replace("_", " "),
            _three_digits(one.get("proxy_set")),
            _three_digits(one.get("random")),
            _MEANINGS.get(name, ""),
        )
        for name, one in found.items()
    ]
    header = ["measure", "chosen", "random", "what it tells"]
    return Table(caption, header, rows, simulated=simulated, words=[3])


def _three_digits(value: float | None) -> str:
    """All alike, so that a column can be compared at a glance."""
    return "–" if value is None else f"{value:,.3f}"
