"""`labels=human` after the probe: writes the annotation job, and lays what comes back over it."""

from __future__ import annotations

import hashlib
import logging
import textwrap
from pathlib import Path
from typing import Any

import torch

from ecos_pl.annotation_job import AnnotationJob, JobTerms
from ecos_pl.annotator_votes import Votes, count_votes
from ecos_pl.images import ImageSource
from ecos_pl.labels_awaited import LabelsAwaited
from ecos_pl.probe_result import ProbeResult
from ecos_pl.ranks import Ranks
from ecos_pl.returned_labels import read_answers
from ecos_pl.storage import read_json, write_json

log = logging.getLogger(__name__)


class OutsourcedLabels:
    """The `Relabeler` that asks people.

    Without labels it writes the job and raises `LabelsAwaited`. What was labelled trains with its
    labels; what nobody has looked at yet, without; what is said to be of no class, not at all. A
    training that has begun keeps to its labels: others are another run.

    Args:
        pool: Where the images are.
        folder: The run's; the job is written to ``annotation/`` in it.
        terms: What the user decides about the job.
        seed: Of the order of the images.
        returned: A label file, or a folder of them, instead of those in ``annotation/``.
        training_began: There is a checkpoint in the run's folder.
        is_trial: Nothing is to be written.
    """

    def __init__(
        self,
        pool: ImageSource,
        folder: Path,
        terms: JobTerms,
        *,
        seed: int,
        returned: Path | None = None,
        training_began: bool = False,
        is_trial: bool = False,
    ) -> None:
        self.pool, self.folder, self.terms, self.seed = pool, folder, terms, seed
        self.returned, self.training_began, self.is_trial = returned, training_began, is_trial

    def apply(self, result: ProbeResult, ranks: Ranks) -> ProbeResult:
        """See `Relabeler`.

        Raises:
            LabelsAwaited: There is no label yet; on every rank.
            ValueError: Labels that cannot be used, or others than those trained with; on rank 0.
            RankError: On the others, then.
        """
        found: Votes | LabelsAwaited | None = None
        with ranks.first() as is_first:
            if is_first:
                found = self._read_or_ask(result)
        votes = ranks.broadcast(found)
        if isinstance(votes, LabelsAwaited):
            raise votes
        assert isinstance(votes, Votes)
        return result.relabelled(
            votes.targets,
            votes.weights,
            result.proxy_set.label_source,
            unlabelled=~votes.answered,
            facts=_facts(votes),
        )

    def _read_or_ask(self, result: ProbeResult) -> Votes | LabelsAwaited:
        job = AnnotationJob.plan(result, self.terms, seed=self.seed)
        place = self.folder / "annotation"
        if self.returned is None:
            if not self.is_trial:
                job.write(place, self.pool)
            elif not place.is_dir():
                raise ValueError(
                    "labels=human: trainer.fast_dev_run writes no annotation job, and there are no "
                    "labels yet"
                )
        source = self.returned or place
        answers = read_answers(source, job.name)
        if not answers:
            if self.returned is not None:
                raise ValueError(f"labels.returned: no label in {self.returned}")
            return LabelsAwaited(_what_to_do(job, place))
        proxy_set = result.proxy_set
        votes = count_votes(answers, proxy_set.ids, proxy_set.classes, job.other)
        if not bool(votes.weights.any()):
            raise ValueError(f"{source} labels no image with a class: {votes.line()}")
        self._keep_to(votes)
        log.warning("labels: %s", votes.line())
        return votes

    def _keep_to(self, votes: Votes) -> None:
        """Record the labels of a training, or check that they are those it began with."""
        path = self.folder / "labels.json"
        facts = {"sha256": _sha256(votes), **_facts(votes)}
        if self.training_began and path.is_file():
            before = read_json(path)
            if before["sha256"] != facts["sha256"]:
                source = self.returned or self.folder / "annotation"
                raise ValueError(
                    f"{self.folder} holds a training with other labels "
                    f"({before['num_labelled']:,} images there, {facts['num_labelled']:,} now); "
                    f"train with these in another run (run_id=NAME labels.returned={source}), or "
                    "remove its checkpoints to begin anew"
                )
        elif not self.is_trial:
            write_json(path, facts)


def _facts(votes: Votes) -> dict[str, Any]:
    return {
        "num_labelled": int((votes.weights > 0).sum()),
        "num_left_out": int((votes.answered & (votes.weights == 0)).sum()),
        "num_answers": votes.num_answers,
        "num_repeated": votes.num_repeated,
        "num_other": votes.num_other,
        "num_unknown": sum(votes.unknown.values()),
    }


def _sha256(votes: Votes) -> str:
    """Of all that reaches the training."""
    columns = [votes.targets, votes.weights[:, None], votes.answered[:, None]]
    table = torch.cat([column.float() for column in columns], dim=1)
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()


def _what_to_do(job: AnnotationJob, folder: Path) -> str:
    """What the terminal shows; only a long path makes it wider than 80 columns."""
    facts = {
        "to label": f"{len(job.rows):,} images in {job.num_batches:,} batches (or fewer)",
        "price": job.price_in_words(),
        "privacy": str(job.result.statement),
        "where": str(folder),
        "how": "fill in the column label of labels.csv, or use Label Studio with tasks.json and "
        "label_config.xml: README.md says how",
        "then": "put exported labels there too, and call the same command again",
    }
    lines = ["the proxy set is chosen, and awaits its labels"]
    for name, text in facts.items():
        lines += textwrap.wrap(
            text,
            width=80,
            initial_indent=f"  {name:<11}",
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)
