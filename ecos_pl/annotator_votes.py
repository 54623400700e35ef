"""What annotators said, image by image, as class probabilities and weights.

Shapes: n images, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """What one annotator said about one image.

    Attributes:
        image_id: The image's id in the pool.
        annotator: Whoever said it.
        label: A class name, or another word.
        where: File, and place in it, for error messages.
    """

    image_id: str
    annotator: str
    label: str
    where: str


@dataclass(frozen=True)
class Votes:
    """The answers of all annotators.

    Attributes:
        targets: [n, K] float32, shares of the votes for each class; zero rows without a label.
        weights: [n] float32, the agreement; 0 without a label.
        answered: [n] bool, somebody said something, be it that it is none of the classes.
        num_answers: One an image and annotator.
        num_repeated: Answers that a later one of the same annotator replaced.
        num_other: Answers that said "none of the classes".
        unknown: How often each word came that is no class.
    """

    targets: Tensor
    weights: Tensor
    answered: Tensor
    num_answers: int
    num_repeated: int
    num_other: int
    unknown: Mapping[str, int]

    def line(self) -> str:
        """Them in one line.

        >>> answers = [Answer("x", "ann", "cat", ""), Answer("x", "ben", "other", "")]
        >>> count_votes(answers, ["x", "y"], ["cat", "dog"], "other").line()
        "0 of 2 images, 2.0 annotators each, 1 'other', 0 of unknown classes; 1 image left out"
        """
        num_images = int(self.answered.sum())
        num_labelled = int((self.weights > 0).sum())
        each = self.num_answers / num_images if num_images else 0.0
        line = (
            f"{num_labelled:,} of {len(self.weights):,} images, {each:.1f} "
            f"annotator{'s' if each != 1 else ''} each, {self.num_other:,} 'other', "
            f"{sum(self.unknown.values()):,} of unknown classes"
        )
        if self.unknown:
            first = [repr(word) for word, _ in Counter(self.unknown).most_common(5)]
            line += f" ({', '.join([*first, '…'] if len(self.unknown) > 5 else first)})"
        if left_out := num_images - num_labelled:
            line += f"; {left_out:,} image{'s' if left_out > 1 else ''} left out"
        if self.num_repeated:
            line += f"; {self.num_repeated:,} answers replaced by later ones of the same annotator"
        return line


def count_votes(
    answers: Sequence[Answer], ids: Sequence[str], classes: Sequence[str], other: str
) -> Votes:
    """Turn answers into soft targets and weights.

    An image with votes c_k for the classes and o for none of them (``other``, or a word that is no
    class) gets the targets c_k / Σ c_k and the weight max c_k / (Σ c_k + o), the share of the
    annotators who agree on its most frequent class: 1 for one annotator, or several of one
    opinion; 0.5 for two who disagree. Where no class has more votes than "none", the image is left
    out: weight 0.

    Args:
        answers: In the order in which they were given: the last of an annotator counts.
        ids: [n], of the proxy set.
        classes: Names of the K classes. Case and outer spaces do not matter, unless they tell two
            classes apart.
        other: The word for "none of the classes".

    Raises:
        ValueError: An answer is about an image that is not there.
    """
    rows = {name: row for row, name in enumerate(ids)}
    last: dict[tuple[int, str], str] = {}
    for answer in answers:
        if answer.image_id not in rows:
            raise ValueError(
                f"{answer.where}: no image {answer.image_id!r} in the proxy set; is this the file "
                "of another run?"
            )
        key = rows[answer.image_id], answer.annotator
        last.pop(key, None)
        last[key] = answer.label
    number = _numbers(classes)
    votes = torch.zeros(len(ids), len(classes) + 1)
    unknown: Counter[str] = Counter()
    num_other = 0
    for (row, _), label in last.items():
        word = label.strip()
        k = number.get(word, number.get(word.casefold(), len(classes)))
        votes[row, k] += 1
        if k == len(classes):
            if word.casefold() == other.casefold():
                num_other += 1
            else:
                unknown[word] += 1
    for_classes, against = votes[:, :-1], votes[:, -1]
    best = for_classes.max(dim=1).values
    has_label = best > against
    total = votes.sum(dim=1)
    shares = for_classes / for_classes.sum(dim=1, keepdim=True).clamp_min(1)
    return Votes(
        targets=shares * has_label[:, None],
        weights=best / total.clamp_min(1) * has_label,
        answered=total > 0,
        num_answers=len(last),
        num_repeated=len(answers) - len(last),
        num_other=num_other,
        unknown=dict(unknown),
    )


def other_word(classes: Sequence[str]) -> str:
    """What annotators choose where no class fits: ``other``, if no class is called that."""
    taken = {name.casefold() for name in classes}
    return next(word for word in ("other", "none of these", "?") if word not in taken)


def _numbers(classes: Sequence[str]) -> dict[str, int]:
    """Class numbers by name, and by name without case where that names one class only."""
    folded = Counter(name.strip().casefold() for name in classes)
    number = {
        name.strip().casefold(): k
        for k, name in enumerate(classes)
        if folded[name.strip().casefold()] == 1
    }
    return {**number, **{name: k for k, name in enumerate(classes)}}
