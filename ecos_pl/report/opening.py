"""The first paragraph: the run in a few plain sentences."""

from __future__ import annotations

from ecos_pl.accounting import round_up
from ecos_pl.report.run_record import RunRecord
from ecos_pl.report.words import counted, percent

_HOW_CHOSEN = {
    "ecos": "They were chosen for a client, without seeing its images, from {pool}",
    "random": "They were drawn at random from {pool}, as a yardstick for choosing with care",
    "all": "They are {pool}, all of it",
    "cluster_uniform": "They were drawn alike from all groups of similar images of {pool}, as a "
    "yardstick for choosing with care",
    "k_center": "They were chosen to stand for the whole of {pool}, as a yardstick for choosing "
    "for a client",
    "mak": "They were chosen from {pool} by looking at the client's own images, as a yardstick",
    "nearest": "They are those of {pool} that lie nearest to the client's own images, as a "
    "yardstick",
    "oracle": "They were drawn from those images of {pool} that are known to be of the client's "
    "kind, which only a simulation can know",
}
_WHO_LABELLED = {
    "client": "What {they} show was worked out from the client's answers.",
    "human": "What {they} show was told by people.",
    "public": "What {they} show was known beforehand, from labels that came with them.",
    "none": "Nobody had to say what the images show.",
}


def opening(record: RunRecord) -> list[str]:
    """Sentences for a reader who knows nothing of this run."""
    if not record.has_proxy_set:
        return [
            f"{_subject(record)} on the client's own images, on the client's side.",
            "Nothing was sent or revealed: the run is a yardstick beside which others are read.",
            *_results(record),
        ]
    size = record.fact("proxy", "size")
    how = _HOW_CHOSEN.get(
        record.option("selection.strategy"), "They were chosen ({strategy}) from {pool}"
    )
    pool = f"a public collection of {counted(record.pool_size, 'image')}"
    how = how.format(pool=pool, strategy=record.option("selection.strategy"))
    return [
        f"{_subject(record)} {_verb(record)} {counted(size, 'public image')}.",
        f"{how}.",
        _cost(record),
        _labels(record),
        *_results(record),
    ]


def _subject(record: RunRecord) -> str:
    classes = len(record.classes)
    task = "that tells images apart"
    if classes:
        task = f"that tells {counted(classes, 'class', 'classes')} of images apart"
    if record.option("task.name") == "compression":
        return f"A trained network {task} was made smaller and faster"
    if record.option("task.name") == "distillation":
        return f"A small network {task} was taught by a larger one"
    return f"A network {task} was trained"


def _verb(record: RunRecord) -> str:
    return "with the help of" if record.option("task.name") == "compression" else "on"


def _cost(record: RunRecord) -> str:
    if not record.is_private:
        return (
            "This is not private: the choice read the client's images themselves, which only a "
            "simulation can do."
        )
    questions = record.fact("communication", "round_trips")
    if not record.epsilon:
        return "The client was asked nothing, so nothing about its images was revealed."
    asked = counted(questions, "question") if questions else "the questions"
    return (
        f"The client answered {asked} with numbers to which it had added random noise; no image "
        f"left it. All answers together cost a privacy loss of ε = {round_up(record.epsilon)}, "
        "explained below."
    )


def _labels(record: RunRecord) -> str:
    size, labelled = record.fact("proxy", "size"), record.fact("proxy", "num_labelled")
    they = "the images" if labelled in (None, size) else f"{labelled:,} of the images"
    who = str(record.option("labels.name")).partition("_")[0]
    return _WHO_LABELLED.get(who, "").format(they=they)


def _results(record: RunRecord) -> list[str]:
    known = record.fact("simulation") or {}
    purity, chance = known.get("purity"), known.get("random_purity")
    accuracy = known.get("test_accuracy")
    found = []
    if purity is not None:
        beside = "" if chance is None else f", where a random choice gives {percent(chance)}"
        found.append(f"{percent(purity)} of the chosen images are of the client's kind{beside}")
    if accuracy is not None:
        found.append(f"the network names {percent(accuracy)} of the client's test images correctly")
    if not found:
        return []
    who = "The client is simulated, so this can be measured: "
    return [who + ", and ".join(found) + "."]
