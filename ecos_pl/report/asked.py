"""What was asked: the task, the data, the encoder, the questions to the client."""

from __future__ import annotations

from ecos_pl.report.blocks import Block, Fact, Facts, Steps, Text
from ecos_pl.report.run_record import RunRecord
from ecos_pl.report.words import counted, listed

_TASKS = {
    "self_labeling": "train a network on labelled public images",
    "distillation": "teach a small network (the student) what a larger one (the teacher) answers",
    "compression": "make a trained network smaller and faster for this client",
}
_METHODS = {
    "fixmatch": "and on unlabelled ones: a changed view of an image must be predicted as the image "
    "itself is, once that prediction is sure (FixMatch)",
    "flexmatch": "and on unlabelled ones: a changed view of an image must be predicted as the "
    "image itself is, once that prediction is sure enough for its class (FlexMatch)",
}
_LABELS = {
    "client_prototypes": "by the client's noisy average of each class",
    "client_table": "by the client's noisy table of classes by region",
    "client_knn": "by noisy votes of the client's nearest images",
    "public": "the public images' own labels",
    "human": "by people, who looked at the public images",
    "none": "none are used",
}
_STRATEGIES = {
    "ecos": "where the client's images lie, by its noisy counts",
    "random": "at random",
    "all": "everything",
    "cluster_uniform": "alike from all groups of similar public images",
    "k_center": "so that every public image is near a chosen one",
    "mak": "near the client's images and diverse, by looking at them (not private)",
    "nearest": "nearest to the client's images, by looking at them (not private)",
    "oracle": "at random from the client's domain, which only a simulation knows",
}


def asked(record: RunRecord) -> list[Block]:
    """Blocks of the section."""
    facts = [Fact("Task", _task(record))]
    if record.classes:
        facts.append(Fact("Classes", f"{len(record.classes):,}", listed(record.classes)))
    pools = record.fact("proxy", "pools") or []
    pool_names = listed([pool["name"] for pool in pools], most=4)
    if record.has_proxy_set:
        facts.append(
            Fact("Public images", counted(record.pool_size, "image"), f"the pool: {pool_names}")
        )
    facts.append(Fact("Client", _client(record), _apart(record)))
    if record.has_proxy_set:
        facts += [
            Fact(
                "Images to choose",
                f"{record.fact('proxy', 'size'):,}",
                "the proxy set: the public images that stand in for the client's",
            ),
            Fact("Chosen", _named(_STRATEGIES, record.option("selection.strategy"))),
            Fact("Labels", _named(_LABELS, record.option("labels.name"))),
            Fact(
                "Encoder",
                str(record.manifest.get("provenance", {}).get("encoder") or _encoder(record)),
                "a public network, never trained on the client's images, that turns an image "
                "into a list of numbers; similar images get similar numbers",
            ),
        ]
    return [Facts(facts), *_questions(record)]


def _task(record: RunRecord) -> str:
    if not record.has_proxy_set:
        return "train a network on the client's own images"
    text = _named(_TASKS, record.option("task.name"))
    method = _METHODS.get(str(record.option("task.method")), "")
    return f"{text} {method}".strip()


def _client(record: RunRecord) -> str:
    if record.is_simulated:
        return "simulated: a part of the data plays the client, on its own side of the protocol"
    return "real: it was asked through a mailbox and answered on its own machine"


def _apart(record: RunRecord) -> str:
    """What was compared so that none of the simulated client's images is tested on, or public."""
    compared = record.fact("simulation", "client", "disjoint")
    if not compared:
        return ""
    repeats = compared["same_pixels"]
    parts = "training and test images"
    if any("pool" in pair for pair in repeats):
        parts += ", and the pool,"
    if any(number is None for number in repeats.values()):
        return f"its {parts} have no image's name in common"
    if found := sum(repeats.values()):
        return f"its {parts} share no image, but {counted(found, 'picture')} under two names"
    return f"its {parts} have no picture in common"


def _encoder(record: RunRecord) -> str:
    name, weights, size = (record.option(f"encoder.{k}") for k in ("name", "weights", "image_size"))
    return f"{name} ({weights}) at {size} px"


def _questions(record: RunRecord) -> list[Block]:
    if not record.has_proxy_set:
        return []
    if not record.is_private:
        return [Text("The choice read the client's images themselves.")]
    if not record.epsilon:
        return [Text("The client was asked nothing.")]
    return [Steps("Questions to the client, in this order", questions(record))]


def questions(record: RunRecord) -> list[str]:
    """What each release of the client answers, in plain words, in their order."""
    kinds = [str(one["kind"]) for one in record.fact("releases") or ()]
    if not kinds:  # a run from before they were in the summary
        kinds = ["coverage_counts"] if record.option("selection.strategy") == "ecos" else []
        if kind := _KINDS.get(str(record.option("labels.name"))):
            kinds += [kind] * (1 + len(record.fact("rounds") or ()))
    words = [_in_words(kind, record) for kind in kinds]
    return [
        f"{text}, once more, now as the network trained so far sees them"
        if kind == "prototypes" and kind in kinds[:place]
        else text
        for place, (kind, text) in enumerate(zip(kinds, words, strict=True))
    ]


_KINDS = {
    "client_prototypes": "prototypes",
    "client_table": "class_table",
    "client_knn": "knn_votes",
}


def _in_words(kind: str, record: RunRecord) -> str:
    return {
        "coverage_counts": f"how many of its images lie in each of "
        f"{record.fact('proxy', 'num_clusters'):,} regions of the public images",
        "prototypes": "the average of its images of each class, as numbers",
        "class_table": "how many of its images of each class lie in each region",
        "knn_votes": "which class its nearest images vote for, at points that the cloud names",
        "knn_screening": "whether those votes agree well enough to be worth an answer",
    }.get(kind, kind.replace("_", " "))


def _named(names: dict[str, str], name: object) -> str:
    return names.get(str(name), str(name).replace("_", " "))
