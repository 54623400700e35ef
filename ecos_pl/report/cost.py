"""What a run cost: privacy, messages, time, labels."""

from __future__ import annotations

import math

from ecos_pl.accounting import round_up
from ecos_pl.report.asked import questions
from ecos_pl.report.blocks import Block, Fact, Facts, Table, Text
from ecos_pl.report.pictures import Figures
from ecos_pl.report.run_record import RunRecord
from ecos_pl.report.words import counted, data_size, duration, number

_STEPS = {
    "embed": "embedding the public images",
    "cluster": "grouping them",
    "ask": "asking the client for counts",
    "select": "choosing images",
    "label": "labelling them",
    "fit": "training",
    "test": "testing",
}
_MIN_SHOWN = 0.05  # seconds


def cost(record: RunRecord, figures: Figures) -> list[Block]:
    """Blocks of the section."""
    ledger = figures.take("privacy_ledger")
    privacy = [*_privacy(record), *([ledger] if ledger is not None else [])]
    return [*privacy, *_messages(record), *_labels(record), *_time(record)]


def _privacy(record: RunRecord) -> list[Block]:
    if not record.has_proxy_set:
        return []
    privacy = record.fact("privacy") or {}
    if not record.is_private:
        text = "Privacy: none. The choice read the client's images, so no ε can be stated."
        return [Text(text)]
    if not record.epsilon:
        return [Text("Privacy: the client released nothing (ε = 0).")]
    unit = str(privacy["unit"])
    one = "image" if unit == "sample" else unit
    facts = [
        Fact(
            "Privacy loss ε",
            round_up(record.epsilon),
            f"of all answers together. The answers can change anyone's odds that any one {one} is "
            f"among the client's by a factor of at most e^ε = {_up(math.exp(record.epsilon))}",
        ),
        Fact(
            "Slack δ",
            f"{privacy['delta']:g}",
            f"the bound may fail with at most this probability, 1 in {1 / privacy['delta']:,.0f}",
        ),
        Fact("Protected", f"each {one}", "the unit of privacy"),
        Fact(
            "Relation",
            str(privacy["relation"]),
            f"the client's data with that {one} is compared with the same data without it",
        ),
        Fact(
            "Accountant",
            str(privacy["accountant"]),
            "how the loss of several answers is added up: privacy loss distributions, rounded "
            "against us",
        ),
    ]
    return [Facts(facts, "Privacy"), *_releases(record)]


def _up(value: float) -> str:
    """Never understated, and short."""
    return f"{math.ceil(10 * value) / 10:.1f}" if value < 1e4 else f"{value:.1e}"


def _releases(record: RunRecord) -> list[Block]:
    rows: list[tuple[str, ...]] = [
        (
            text,
            f"{one['repeats']:,}",
            f"{number(one['noise_std'] / one['sensitivity'])}×",
            round_up(one["epsilon"]),
        )
        for text, one in zip(questions(record), record.fact("releases") or (), strict=False)
    ]
    if not rows:
        return []
    header = ["answer", "times", "noise", "ε alone"]
    if all(row[1] == "1" for row in rows):
        header, rows = [header[0], *header[2:]], [(row[0], *row[2:]) for row in rows]
    note = (
        "Noise is the standard deviation of the random numbers that the client added, in units of "
        "what one image (or person) can change. ε of each answer is what it would cost alone; "
        "together they cost less than the sum."
    )
    return [Table("Answers of the client", header, rows, note)]


def _messages(record: RunRecord) -> list[Block]:
    sent = record.fact("communication") or {}
    trips = sent.get("round_trips")
    if not trips:
        return []
    facts = [
        Fact("Sent to the client", data_size(sent["bytes_down"]), _what_was_sent(record)),
        Fact("Sent by the client", data_size(sent["bytes_up"]), "its answers; no image"),
        Fact("Messages", f"{2 * trips:,}", f"{counted(trips, 'question')}, each answered once"),
    ]
    return [Facts(facts, "Messages")]


def _what_was_sent(record: RunRecord) -> str:
    what = ["questions"]
    if adapted := sum(one["bytes_down"] for one in record.fact("rounds") or ()):
        what.append(f"a network trained so far, to ask again in its terms ({data_size(adapted)})")
    if delivered := record.fact("delivered"):
        what.append(f"the finished model ({data_size(sum(delivered.values()))})")
    return ", and ".join(what)


def _labels(record: RunRecord) -> list[Block]:
    """How many labels, whose, and the price."""
    size, labelled = record.fact("proxy", "size"), record.fact("proxy", "num_labelled")
    if labelled is None or record.option("labels.name") == "none":
        return []
    facts = [Fact("Labelled images", f"{labelled:,} of {size:,}", _who(record))]
    if (asked := record.manifest.get("provenance", {}).get("labels", {}).get("num_asked")) and (
        record.option("labels.name") == "public"
    ):
        facts.append(
            Fact("Images looked at", f"{asked:,}", "as if annotators had stopped after so many")
        )
    if record.option("labels.name") == "human":
        facts += _price(record)
    return [Facts(facts, "Labels")]


def _who(record: RunRecord) -> str:
    name = str(record.option("labels.name"))
    if name.startswith("client"):
        return "labels worked out from the client's answers; their privacy is in ε above"
    return {
        "public": "labels that came with the public images; free of charge, and of privacy loss",
        "human": "labels given by people; they see public images only",
    }.get(name, "")


def _price(record: RunRecord) -> list[Fact]:
    answers, job = record.answers, record.job
    per_label = record.option("labels.price_per_label")
    facts = []
    if answers:
        left_out = answers.get("num_left_out", 0)
        num_answers = answers["num_answers"]
        notes = [f"{answers['num_other']:,} of them 'none of the classes'"]
        if left_out:
            notes.append(f"{counted(left_out, 'image')} left out as showing no class")
        facts.append(Fact("Answers by people", f"{num_answers:,}", "; ".join(notes)))
        if per_label is not None:
            facts.append(
                Fact(
                    "Price of the answers",
                    f"{num_answers * per_label:,.2f}",
                    f"{num_answers:,} answers at {per_label:g} each, in your currency",
                )
            )
    if job:
        how = f"{counted(job['num_images'], 'image')} by {counted(job['annotators'], 'annotator')}"
        facts.append(Fact("Price of the whole job", f"{job['price_estimate']:,.2f}", how))
    return facts


def _time(record: RunRecord) -> list[Block]:
    """Seconds of each step. How long a real client takes is its own matter, and left out."""
    seconds = record.fact("seconds") or {}
    withheld = set()
    if not record.is_simulated:
        withheld = {"ask"}
        if str(record.option("labels.name")).startswith("client"):
            withheld.add("label")
    steps = {name: seconds.get(name) or 0.0 for name in _STEPS if name not in withheld}
    shown = {name: value for name, value in steps.items() if value >= _MIN_SHOWN}
    if not shown:
        return []
    most = max(shown.values())
    notes = []
    if seconds.get("per_step"):
        notes.append(f"A training step took {duration(seconds['per_step'])}.")
    if record.fact("proxy", "from_disk"):
        notes.append("The choice of images was on disk from an earlier run and took no time here.")
    if withheld:
        notes.append("How long the client took is its own matter and not shown.")
    return [
        Table(
            "Time, by step",
            ["step", "time"],
            [(_STEPS[name], duration(value)) for name, value in shown.items()],
            " ".join(notes),
            shares=[value / most for value in shown.values()],
        )
    ]
