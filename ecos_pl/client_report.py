"""What the client's program prints: the ledger, a message, an evaluation. For 80 columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ecos_pl.accounting import PrivacyStatement, epsilon_of
from ecos_pl.client_policy import ClientPolicy
from ecos_pl.envelope import MAX_BYTES, MessageError, is_signed, unseal
from ecos_pl.image_reader import SourceDataset
from ecos_pl.images import ImageSource
from ecos_pl.ledger import Ledger
from ecos_pl.message_format import describe_message, query_id_of
from ecos_pl.privacy import Release
from ecos_pl.progress import progress_bar

_WORDS = {
    "coverage_counts": "counts",
    "prototypes": "class means",
    "class_table": "counts per class",
    "knn_screening": "screenings",
    "knn_votes": "votes",
}


def ledger_lines(ledger: Ledger, policy: ClientPolicy) -> Iterator[str]:
    """What was released, when, to whom; ε so far, and what is left."""
    entries = ledger.entries()
    if entries:
        yield f"{'':>3}  {'when (UTC)':19}  {'to whom':14} {'what':26} {'ε alone':>8}"
    for entry in entries:
        first, *others = (_release_words(release) for release in entry.releases)
        alone = epsilon_of(entry.releases, policy.delta)
        when, who = entry.charged_at[:19].replace("T", " "), entry.requester[:14]
        yield f"{entry.number:>3}  {when:19}  {who:14} {first:26} {alone:>8.3f}"
        yield from (f"{'':42}{other}" for other in others)
        if not entry.answered:
            yield f"{'':42}charged, never answered"
    releases = [release for entry in entries for release in entry.releases]
    spent = epsilon_of(releases, policy.delta)
    unit = "sample" if policy.max_per_person is None else "person"
    yield f"in all: {PrivacyStatement(spent, policy.delta, unit=unit)}"
    if policy.max_epsilon is not None:
        yield f"left:   ε = {max(0.0, policy.max_epsilon - spent):.3f} of {policy.max_epsilon:g}"
    if policy.max_queries is not None:
        yield f"        {max(0, policy.max_queries - len(entries))} of {policy.max_queries} answers"


def _release_words(release: Release) -> str:
    times = f"{release.repeats} " if release.repeats > 1 else ""
    rate = f", 1 in {1 / release.sample_rate:g}" if release.sample_rate < 1 else ""
    words = _WORDS.get(release.kind, release.kind)
    return f"{times}{words}, noise {release.noise_multiplier:.4g}{rate}"


def message_lines(path: Path) -> Iterator[str]:
    """A message in words, sealed (as it travels) or bare (as it is kept).

    Raises:
        MessageError: It cannot be read, or is damaged.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MessageError(f"{path} is larger than any message ({MAX_BYTES:,} bytes)")
        content = path.read_bytes()
    except OSError as error:
        raise MessageError(f"cannot read {path}: {error.strerror}") from error
    yield f"{path.name}: {len(content):,} bytes"
    payload = content
    if content.startswith(b"{"):
        payload, sender = unseal(content)
        signed = "signed (not checked here)" if is_signed(content) else "not signed"
        yield f"sealed, whole, {signed}, from {sender!r}"
    yield f"payload id {query_id_of(payload)}"
    try:
        yield from describe_message(payload)
    except MessageError:
        lines = _model_lines(payload)
        if not lines:
            raise
        yield from lines


def _model_lines(payload: bytes) -> list[str]:
    """What a model's file says of itself; nothing if it is none."""
    try:
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
        about = header.pop("__metadata__")
        ((name, text),) = about.items()
        facts = {**json.loads(text), "tensors": len(header)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ["an ONNX model, as it seems"] if payload[:1] == b"\x08" else []
    shown = [
        f"  {key!s:20} {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()
    ]
    lines = ["a model file", *shown] if name in ("ecos_pl", "ecos_backbone") else []
    return ["".join(c if c.isprintable() else "?" for c in line)[:200] for line in lines]


class Scorer(Protocol):
    """A delivered model of whatever kind."""

    @property
    def classes(self) -> list[str]: ...  # noqa: D102

    @property
    def image_size(self) -> int: ...  # noqa: D102

    def __call__(self, images: Tensor, /) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        ...


@torch.inference_mode()
def evaluation_lines(model: Scorer, source: ImageSource, *, batch_size: int = 256) -> Iterator[str]:
    """Accuracy of a model on the client's own test images; for the client's eyes alone.

    Raises:
        ValueError: No test image is of a class that the model knows.
    """
    number = {name: k for k, name in enumerate(model.classes)}
    known = [index for index, label in enumerate(source.labels) if label in number]
    if not known:
        raise ValueError(
            f"no test image is of a class that the model knows ({', '.join(model.classes[:10])})"
        )
    dataset = SourceDataset(source, known, model.image_size)
    right = torch.zeros(len(model.classes), dtype=torch.int64)
    total = torch.zeros_like(right)
    with progress_bar("evaluating", len(known), "images") as advance:
        for images, labels in _batches(dataset, source.labels, number, batch_size):
            hit = model(images).argmax(dim=1) == labels
            right += torch.bincount(labels[hit], minlength=len(right))
            total += torch.bincount(labels, minlength=len(total))
            advance(len(labels))
    yield f"accuracy {int(right.sum()) / max(1, int(total.sum())):.4f} on {int(total.sum())} images"
    for k, name in enumerate(model.classes):
        if total[k]:
            yield f"  {name:20} {int(right[k]) / int(total[k]):.4f} ({int(total[k])})"
    if len(known) < len(source):
        yield f"left out: {len(source) - len(known)} images of classes that the model does not know"


def _batches(
    dataset: SourceDataset, names: Sequence[str | None], number: dict[str, int], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(dataset), batch_size):
        rows = range(first, min(first + batch_size, len(dataset)))
        read = [(index, image) for index, image in map(dataset.__getitem__, rows) if index >= 0]
        if read:
            labels = [number[names[index] or ""] for index, _ in read]
            yield torch.stack([image for _, image in read]), torch.tensor(labels)
