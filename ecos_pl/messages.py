"""What crosses between the parties: the questions and their answers.

`Message.from_bytes` refuses whatever is not exactly of its kind. What only the client can judge
(its encoder, its policy) is checked in `client.py`; what only the cloud can judge (does the answer
fit the question and the plan) where it asks.

Shapes: D encoder dimensions, d projected dimensions, R centroids, K classes, Q points.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ecos_pl.envelope import MessageError
from ecos_pl.message_format import Message, kind_of, query_id_of

__all__ = [
    "ANSWERS",
    "Answer",
    "CoverageAnswer",
    "CoverageQuery",
    "Encoding",
    "MessageError",
    "PrototypeAnswer",
    "PrototypeQuery",
    "Query",
    "Refusal",
    "TableAnswer",
    "TableQuery",
    "VoteAnswer",
    "VoteQuery",
    "is_sha256",
    "kind_of",
    "query_id_of",
    "read_query",
]

MAX_CLASSES = 10_000


def is_sha256(value: object) -> bool:
    """Whether it is a text of 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


@dataclass(frozen=True)
class Encoding:
    """How the client must embed its images before it answers: the public encoder, then a map.

    The client computes ``(encoder(image) - mean) @ components.T``. ``encoder`` holds ``name``,
    ``image_size`` and ``features``; for a backbone that the cloud has trained further and sent
    beforehand also ``model``, the SHA-256 (64 hex digits) of its file.
    """

    encoder: dict[str, Any]
    encoder_fingerprint: str
    mean: Tensor  # [D] float16
    components: Tensor  # [d, D] float16

    def check_encoding(self) -> None:
        """Raise MessageError unless names, types and shapes fit."""
        texts = [self.encoder.get("name"), self.encoder.get("features")]
        named = all(isinstance(t, str) and 0 < len(t) <= 200 and t.isprintable() for t in texts)
        size = self.encoder.get("image_size")
        sized = type(size) is int and 1 <= size <= 4096
        fields = set(self.encoder) - {"model"}
        if fields != {"name", "image_size", "features"} or not named or not sized:
            raise MessageError("the encoder must be given by name, image_size and features alone")
        if "model" in self.encoder and not is_sha256(self.encoder["model"]):
            raise MessageError("the encoder's model must be 64 hexadecimal digits")
        if len(self.encoder_fingerprint) != 64:
            raise MessageError("the encoder's fingerprint must be 64 hexadecimal digits")
        if self.mean.ndim != 1 or self.components.ndim != 2 or len(self.components) < 1:
            raise MessageError("the projection must be a mean [D] and components [d, D]")
        if self.components.shape[1] != len(self.mean):
            raise MessageError("the projection's mean and components differ in dimension")
        _check_half(mean=self.mean, components=self.components)

    def project(self, embeddings: Tensor) -> Tensor:
        """Apply the map to embeddings [n, D]: [n, d] float32, each row on its own."""
        centred = embeddings.float() - self.mean.float()
        # Row by row: a matrix product may round a row differently with its place in the batch.
        components = self.components.float()
        # It may also do so with its place in memory, hence the copy.
        rows = [components @ row.clone() for row in centred]
        return torch.stack(rows) if rows else centred.new_empty(0, len(components))


@dataclass(frozen=True)
class CoverageQuery(Message, Encoding):
    """How many of your images lie nearest to each of these centroids?"""

    kind: ClassVar[str] = "coverage_query"
    centroids: Tensor  # [R, d] float16
    noise_std: float
    sample_rate: float
    attempt: int

    def __post_init__(self) -> None:
        self.check_encoding()
        _check_points("centroids", self.centroids, self.components)


@dataclass(frozen=True)
class PrototypeQuery(Message, Encoding):
    """What do your images of each class look like on average, in this space?"""

    kind: ClassVar[str] = "prototype_query"
    classes: list[str]
    clip_norm: float
    count_weight: float
    noise_multiplier: float
    sample_rate: float
    attempt: int

    def __post_init__(self) -> None:
        self.check_encoding()
        _check_classes(self.classes)


@dataclass(frozen=True)
class TableQuery(Message, Encoding):
    """How many of your images of each class lie nearest to each of these centroids?"""

    kind: ClassVar[str] = "table_query"
    centroids: Tensor  # [R, d] float16
    classes: list[str]
    noise_std: float
    sample_rate: float
    attempt: int

    def __post_init__(self) -> None:
        self.check_encoding()
        _check_points("centroids", self.centroids, self.components)
        _check_classes(self.classes)


@dataclass(frozen=True)
class VoteQuery(Message, Encoding):
    """Of which class are most of your images near each of these points? (private kNN)

    ``screening_noise_std`` and ``threshold`` are zero where no vote is screened.
    """

    kind: ClassVar[str] = "vote_query"
    points: Tensor  # [Q, d] float16
    classes: list[str]
    num_neighbors: int
    max_answers: int
    vote_noise_std: float
    screening_noise_std: float
    threshold: float
    sample_rate: float
    attempt: int

    def __post_init__(self) -> None:
        self.check_encoding()
        _check_points("points", self.points, self.components)
        _check_classes(self.classes)


@dataclass(frozen=True)
class Answer(Message):
    """What every answer declares about its noise.

    ``max_per_unit`` is how many samples of one unit of privacy took part at most: 1 where each
    sample is protected on its own, m where a person with up to m samples is. Noise is that many
    times what was asked for, so that the noise multiplier, and ε, are what was asked for.
    """

    query_id: str
    sample_rate: float
    relation: str
    max_per_unit: int


@dataclass(frozen=True)
class CoverageAnswer(Answer):
    """Noisy coverage counts."""

    kind: ClassVar[str] = "coverage_answer"
    noisy_counts: Tensor  # [R] int64
    noise_std: float


@dataclass(frozen=True)
class PrototypeAnswer(Answer):
    """Noisy per-class feature sums and counts, in steps of the public grid."""

    kind: ClassVar[str] = "prototype_answer"
    sums: Tensor  # [K, d] int64
    counts: Tensor  # [K] int64
    grid: float
    clip_norm: float
    count_weight: float
    noise_std: float


@dataclass(frozen=True)
class TableAnswer(Answer):
    """Noisy counts of each class at each centroid."""

    kind: ClassVar[str] = "table_answer"
    noisy_counts: Tensor  # [R, K] int64
    noise_std: float


@dataclass(frozen=True)
class VoteAnswer(Answer):
    """The class with most noisy votes at each point; -1 where none was given."""

    kind: ClassVar[str] = "vote_answer"
    labels: Tensor  # [Q] int64


@dataclass(frozen=True)
class Refusal(Message):
    """The client does not answer; nothing was charged unless the reason says so."""

    kind: ClassVar[str] = "refusal"
    query_id: str
    reason: str


Query = CoverageQuery | PrototypeQuery | TableQuery | VoteQuery
QUERIES: tuple[type[Query], ...] = (CoverageQuery, PrototypeQuery, TableQuery, VoteQuery)
ANSWERS: tuple[type[Answer], ...] = (CoverageAnswer, PrototypeAnswer, TableAnswer, VoteAnswer)


def read_query(content: bytes) -> Query:
    """Parse a query of any kind.

    Raises:
        MessageError: It is damaged, or no query; the text is one line.
    """
    kind = kind_of(content)
    for query in QUERIES:
        if kind == query.kind:
            return query.from_bytes(content)
    raise MessageError(f"a client does not answer a {kind!r}")


def _check_half(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float16:
            raise MessageError(f"the {name} must be float16, not {tensor.dtype}")


def _check_points(name: str, points: Tensor, components: Tensor) -> None:
    if points.ndim != 2 or len(points) < 1 or points.shape[1] != len(components):
        raise MessageError(f"the {name} must be a table [R, d] with the projection's d")
    _check_half(**{name: points})


def _check_classes(classes: list[str]) -> None:
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise MessageError(f"between 1 and {MAX_CLASSES:,} classes must be named")
    if len(set(classes)) != len(classes):
        raise MessageError("a class is named twice")
    if not all(0 < len(name) <= 200 for name in classes):
        raise MessageError("a class name must have 1 to 200 characters")
