"""The client party: private images, a policy, and a ledger; queries in, noisy answers out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ecos_pl.coverage import release_coverage
from ecos_pl.embedding_bank import build_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import ImageSource
from ecos_pl.ledger import Ledger
from ecos_pl.messages import (
    CoverageAnswer,
    CoverageQuery,
    Encoding,
    MessageError,
    PrototypeAnswer,
    PrototypeQuery,
    kind_of,
    query_id_of,
)
from ecos_pl.privacy import Release
from ecos_pl.prototypes import GRID, release_prototypes, sensitivity_in_steps

RELATION = "add/remove"


@dataclass(frozen=True)
class ClientPolicy:
    """What the client is willing to release; its own, never the cloud's.

    Attributes:
        noise_std: Noise on each coverage count, in images.
        sample_rate: Probability with which each image takes part in an answer.
        delta: Of the (ε, δ) guarantee.
        max_epsilon: Limit on ε over everything ever released.
        max_clusters: Most centroids one query may hold.
    """

    noise_std: float = 5.0
    sample_rate: float = 1.0
    delta: float = 1e-5
    max_epsilon: float | None = None
    max_clusters: int = 10_000


class Client:
    """Answers queries about private images, each query once and under the policy.

    Args:
        folder: The client's own folder: the ledger and the embeddings of its images. Made if
            absent.
        source: The private images; ``labels`` hold their classes.
        policy: What may be released.
        encoder: The public encoder that the client trusts; a query for another one is refused.
        device: Where images are embedded.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images.
    """

    def __init__(
        self,
        folder: Path,
        source: ImageSource,
        policy: ClientPolicy,
        *,
        encoder: EncoderSpec,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        self.folder, self.source, self.policy, self.encoder = folder, source, policy, encoder
        self._device, self._batch_size, self._num_workers = device, batch_size, num_workers
        self._embeddings: Tensor | None = None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "ledger.sqlite"
        client_id = source.fingerprint[:32]
        if not path.exists():
            Ledger.create(path, client_id=client_id)
        self.ledger = Ledger.open(path, client_id=client_id)

    def answer(self, content: bytes) -> bytes:
        """Check a query, charge it, and return the answer; asked again, the same bytes.

        Raises:
            MessageError: The query is not acceptable; nothing was charged.
            LedgerError: The budget is spent, or the ledger cannot be used.
        """
        kind = kind_of(content)
        if kind == CoverageQuery.kind:
            coverage = CoverageQuery.from_bytes(content)
            return self._release(content, *self._coverage(content, coverage))
        if kind == PrototypeQuery.kind:
            prototypes = PrototypeQuery.from_bytes(content)
            return self._release(content, *self._prototypes(content, prototypes))
        raise MessageError(f"this client does not answer a {kind!r}")

    def _release(self, content: bytes, release: Release, draw: Callable[[], bytes]) -> bytes:
        return self.ledger.answer(
            query_id_of(content),
            hashlib.sha256(content).hexdigest(),
            release,
            draw,
            max_epsilon=self.policy.max_epsilon,
            delta=self.policy.delta,
        )

    def _coverage(
        self, content: bytes, query: CoverageQuery
    ) -> tuple[Release, Callable[[], bytes]]:
        num_clusters = len(query.centroids)
        if not 2 <= num_clusters <= self.policy.max_clusters:
            raise MessageError(
                f"{num_clusters} centroids asked about, this client answers for 2 to "
                f"{self.policy.max_clusters}"
            )
        features = self._features(query)
        noise_std, sample_rate = self.policy.noise_std, self.policy.sample_rate
        release = Release("coverage_counts", noise_std, 1.0, sample_rate, one_coordinate=True)

        def draw() -> bytes:
            noisy, made = release_coverage(
                features, query.centroids.float(), noise_std=noise_std, sample_rate=sample_rate
            )
            assert made == release, "what is drawn must be what was charged"
            answer = CoverageAnswer(query_id_of(content), noisy, noise_std, sample_rate, RELATION)
            return answer.to_bytes()

        return release, draw

    def _prototypes(
        self, content: bytes, query: PrototypeQuery
    ) -> tuple[Release, Callable[[], bytes]]:
        features = self._features(query)
        index = {name: number for number, name in enumerate(query.classes)}
        rows, labels = self._labelled(index)
        sample_rate = self.policy.sample_rate
        if not (GRID <= query.count_weight <= 1 and GRID <= query.clip_norm <= 1 / GRID):
            raise MessageError("clip_norm or count_weight is out of range")
        sensitivity = sensitivity_in_steps(round(query.count_weight / GRID))
        try:
            noise_std = query.noise_multiplier * sensitivity
            release = Release("prototypes", noise_std, sensitivity, sample_rate)
        except ValueError as error:
            raise MessageError(str(error)) from error

        def draw() -> bytes:
            noisy, made = release_prototypes(
                features[rows],
                labels,
                len(index),
                clip_norm=query.clip_norm,
                count_weight=query.count_weight,
                noise_multiplier=query.noise_multiplier,
                sample_rate=sample_rate,
            )
            assert made == release, "what is drawn must be what was charged"
            answer = PrototypeAnswer(
                query_id_of(content),
                noisy.sums,
                noisy.counts,
                noisy.grid,
                noisy.clip_norm,
                noisy.count_weight,
                noisy.noise_std,
                sample_rate,
                RELATION,
            )
            return answer.to_bytes()

        return release, draw

    def _features(self, query: Encoding) -> Tensor:
        """The client's images in the query's space [n, d]; unreadable ones are left out."""
        if query.encoder_fingerprint != self.encoder.fingerprint():
            raise MessageError(
                "the query is for another encoder (architecture, weights or image size differ "
                "from the one this client trusts)"
            )
        embeddings = self._own_embeddings()
        if embeddings.shape[1] != len(query.mean):
            raise MessageError("the query's projection does not fit the encoder")
        return query.project(embeddings)

    def _own_embeddings(self) -> Tensor:
        if self._embeddings is None:
            fingerprint = self.encoder.fingerprint()
            folder = self.folder / f"embeddings-{fingerprint[:16]}-{self.source.fingerprint[:16]}"
            encoder = Encoder(self.encoder).to(self._device)
            bank = build_bank(
                folder,
                self.source,
                encoder,
                image_size=self.encoder.image_size,
                batch_size=self._batch_size,
                num_workers=self._num_workers,
                device=self._device,
                title=None,
            )
            parts = [torch.from_numpy(chunk.copy()).float() for _, chunk in bank.chunks()]
            rows = torch.cat(parts) if parts else torch.empty(0, encoder.num_dims)
            self._readable = torch.nonzero(~rows.isnan().any(dim=1)).flatten()
            self._embeddings = rows[self._readable]
        return self._embeddings

    def _labelled(self, index: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Rows of the embeddings whose class was asked about, and their class numbers."""
        self._own_embeddings()
        names = [self.source.labels[row] for row in self._readable]
        found = [(row, index[name]) for row, name in enumerate(names) if name in index]
        rows = torch.tensor([row for row, _ in found], dtype=torch.int64)
        return rows, torch.tensor([label for _, label in found], dtype=torch.int64)
