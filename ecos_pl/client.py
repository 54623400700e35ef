"""The client party: private images, a policy and a ledger; questions in, noisy answers out."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ecos_pl.accounting import epsilon_of
from ecos_pl.adapted_encoders import AdaptedEncoders
from ecos_pl.client_answers import (
    PlannedAnswer,
    coverage_answer,
    prototype_answer,
    table_answer,
    vote_answer,
)
from ecos_pl.client_policy import ClientPolicy
from ecos_pl.encoder import FEATURES, EncoderSpec, FeaturesError
from ecos_pl.images import ImageSource
from ecos_pl.ledger import Ledger
from ecos_pl.messages import (
    CoverageQuery,
    Encoding,
    MessageError,
    PrototypeQuery,
    Query,
    TableQuery,
    VoteQuery,
    query_id_of,
    read_query,
)
from ecos_pl.privacy import load_sampler
from ecos_pl.private_images import PrivateImages
from ecos_pl.prototypes import GRID
from ecos_pl.storage import read_json, write_json

MAX_VALUES = 1_000_000
"""Most integers in one answer."""


class UnknownEncoderError(MessageError):
    """The query is for an encoder that nobody has said yes to yet."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(f"this client does not know the encoder {spec.name} yet")
        self.spec = spec


@dataclass(frozen=True)
class Request:
    """A query that passed every check; nothing is charged yet.

    Attributes:
        query_id: Its name.
        sha256: Hash of its bytes.
        plan: What is asked, what it costs, and how the answer is drawn.
        encoder: What the images are embedded with.
    """

    query_id: str
    sha256: str
    plan: PlannedAnswer
    encoder: EncoderSpec


@dataclass(frozen=True)
class Cost:
    """ε over everything ever released, before and after a request is answered.

    Attributes:
        before: ε so far.
        after: ε once it is answered.
        is_charged: It was charged before, and is answered with the same bytes.
    """

    before: float
    after: float
    is_charged: bool


class Client:
    """Answers queries about private images, each query once and under the policy.

    Args:
        images: The private images.
        policy: What may be released.
        ledger: What was released.
        labelled: Whether the images carry classes. Declared, not looked up: that no image carries
            one must not show.

    Raises:
        ValueError: The installed encoder is not the one that the policy pins.
    """

    def __init__(
        self,
        images: PrivateImages,
        policy: ClientPolicy,
        ledger: Ledger,
        *,
        labelled: bool = True,
    ) -> None:
        self.images, self.policy, self.ledger, self._labelled = images, policy, ledger, labelled
        self._encoders = {spec.fingerprint(): spec for spec in self._trusted()}
        self._adapted = AdaptedEncoders(images.folder / "adapted")
        if policy.fingerprint is not None and policy.fingerprint not in self._encoders:
            raise ValueError(
                "the encoder installed here is not the one that the policy pins: its fingerprint "
                f"is {next(iter(self._encoders))}, the policy says {policy.fingerprint}"
            )

    @classmethod
    def simulated(cls, folder: Path, source: ImageSource, policy: ClientPolicy) -> Client:
        """A client in this process, its ledger made with it: for simulations and tests."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path, client_id = folder / "ledger.sqlite", source.fingerprint[:32]
        if not path.exists():
            Ledger.create(path, client_id=client_id)
        ledger = Ledger.open(path, client_id=client_id)
        return cls(PrivateImages(folder, source), policy, ledger)

    def read(self, content: bytes) -> Request:
        """Check everything about a query; nothing is charged or drawn.

        Raises:
            MessageError: The query is damaged, or asks for more than the policy allows.
            UnknownEncoderError: Its encoder must be trusted first (`trust`).
            MissingModelError: Its encoder's backbone must be had first (`adopt`).
        """
        query = read_query(content)
        query_id = query_id_of(content)
        self._check(query)
        encoder = self._encoder_for(query)
        try:
            if isinstance(query, CoverageQuery):
                images = self.images.features(query, encoder)
            else:
                images = self.images.labelled(query, encoder, query.classes)
        except FeaturesError as error:
            raise MessageError(str(error)) from error
        try:
            if isinstance(query, CoverageQuery):
                plan = coverage_answer(query, query_id, images)
            elif isinstance(query, PrototypeQuery):
                plan = prototype_answer(query, query_id, images)
            elif isinstance(query, TableQuery):
                plan = table_answer(query, query_id, images)
            else:
                plan = vote_answer(query, query_id, images)
        except ValueError as error:  # a number out of range: the releases check their arguments
            raise MessageError(str(error)) from error
        return Request(query_id, hashlib.sha256(content).hexdigest(), plan, encoder)

    def answer(self, content: bytes, requester: str = "") -> bytes:
        """Check a query, charge it, and return the answer; asked again, the same bytes.

        Raises:
            MessageError: The query is not acceptable; nothing was charged.
            LedgerError: The budget is spent, or the ledger cannot be used.
        """
        return self.give(self.read(content), requester)

    def give(self, request: Request, requester: str = "") -> bytes:
        """Charge a request that was read, and return its answer (LedgerError)."""
        load_sampler()
        return self.ledger.answer(
            request.query_id,
            request.sha256,
            request.plan.releases,
            request.plan.draw,
            max_epsilon=self.policy.max_epsilon,
            delta=self.policy.delta,
            requester=requester,
            max_queries=self.policy.max_queries,
        )

    def cost(self, request: Request) -> Cost:
        """What answering would cost, at the policy's δ (LedgerError)."""
        entries, delta = self.ledger.entries(), self.policy.delta
        spent = [release for entry in entries for release in entry.releases]
        before = epsilon_of(spent, delta)
        if any(entry.query_id == request.query_id for entry in entries):
            return Cost(before, before, is_charged=True)
        after = epsilon_of([*spent, *request.plan.releases], delta)
        return Cost(before, after, is_charged=False)

    def trust(self, spec: EncoderSpec) -> None:
        """Accept an encoder from now on, as it is installed here; kept in the client's folder."""
        self._encoders[spec.fingerprint()] = spec
        known = [asdict(spec) for spec in self._encoders.values()]
        write_json(self.images.folder / "encoders.json", known)

    def adopt(self, content: bytes) -> None:
        """Take the file of a backbone that the cloud trained further; kept in the client's folder.

        Raises:
            MessageError: The policy or a check is against it; nothing was kept.
        """
        self._check_adapted()
        self._adapted.adopt(content, self._architectures())

    def embed(self) -> None:
        """Embed the images beforehand: no answer's time shall tell how many they are."""
        for encoder in self._encoders.values():
            for features in FEATURES:
                with suppress(FeaturesError):  # not every architecture gives all of them
                    self.images.embeddings(replace(encoder, features=features))

    # --- checks, all before anything is charged -------------------------------------------------

    def _check(self, query: Query) -> None:
        policy = self.policy
        if query.sample_rate > policy.max_sample_rate:
            raise MessageError(
                f"sample_rate {query.sample_rate:g} asked for, this client's policy allows "
                f"{policy.max_sample_rate:g} at most"
            )
        if isinstance(query, CoverageQuery | TableQuery):
            self._check_centroids(query.centroids)
            self._check_noise("noise_std", query.noise_std, policy.min_noise_std)
        if isinstance(query, PrototypeQuery):
            self._check_multiplier(query.noise_multiplier)
            if not (GRID <= query.count_weight <= 1 and GRID <= query.clip_norm <= 1 / GRID):
                raise MessageError("clip_norm or count_weight is out of range")
            self._check_labels(query, len(query.components) + 1)
        if isinstance(query, TableQuery):
            self._check_labels(query, len(query.centroids))
        if isinstance(query, VoteQuery):
            self._check_number("points", len(query.points))
            self._check_multiplier(query.vote_noise_std / math.sqrt(2))
            if query.screening_noise_std != 0:
                self._check_multiplier(query.screening_noise_std)
            self._check_labels(query, len(query.points))

    def _check_centroids(self, centroids: Tensor) -> None:
        self._check_number("centroids", len(centroids))
        if len(torch.unique(centroids.float(), dim=0)) != len(centroids):
            raise MessageError("two of the centroids are the same")

    def _check_number(self, name: str, number: int) -> None:
        if not 2 <= number <= self.policy.max_clusters:
            raise MessageError(
                f"{number} {name} asked about, this client answers for 2 to "
                f"{self.policy.max_clusters}"
            )

    def _check_multiplier(self, multiplier: float) -> None:
        self._check_noise("noise multiplier", multiplier, self.policy.min_noise_multiplier)

    def _check_noise(self, name: str, noise: float, least: float) -> None:
        if not noise >= least:
            raise MessageError(
                f"{name} {noise:g} asked for, this client's policy says {least:g} at least"
            )

    def _check_labels(self, query: PrototypeQuery | TableQuery | VoteQuery, rows: int) -> None:
        if not self._labelled:
            raise MessageError("this client's images carry no classes")
        if len(query.classes) * rows > MAX_VALUES:
            raise MessageError(f"more than {MAX_VALUES:,} numbers asked for")

    # --- the encoder ----------------------------------------------------------------------------

    def _check_adapted(self) -> None:
        if not self.policy.adapted_encoders:
            raise MessageError(
                "this client's policy allows no encoder that the cloud has trained further "
                "(adapted_encoders: false)"
            )

    def _architectures(self) -> set[str]:
        return {spec.name for spec in self._encoders.values()}

    def _encoder_for(self, query: Encoding) -> EncoderSpec:
        if "model" in query.encoder:
            self._check_adapted()
            return self._adapted.spec_for(query, self._architectures())
        if query.encoder_fingerprint in self._encoders:
            if query.encoder["features"] not in FEATURES:
                raise MessageError(f"there are no encoder features {query.encoder['features']!r}")
            known = self._encoders[query.encoder_fingerprint]
            return replace(known, features=query.encoder["features"])
        spec = EncoderSpec(query.encoder["name"], "auto", query.encoder["image_size"])
        asked_before = any(
            (known.name, known.image_size) == (spec.name, spec.image_size)
            for known in self._encoders.values()
        )
        if self.policy.encoder is None and not asked_before:
            raise UnknownEncoderError(spec)
        raise MessageError(
            "the query is for another encoder (architecture, weights or image size differ "
            "from the one this client trusts)"
        )

    def _trusted(self) -> list[EncoderSpec]:
        if self.policy.encoder is not None:
            return [self.policy.encoder]
        path = self.images.folder / "encoders.json"
        return [EncoderSpec(**known) for known in read_json(path)] if path.is_file() else []
