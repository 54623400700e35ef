"""The client's images as features in a query's space; nothing here leaves the client."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ecos_pl.embedding_bank import build_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import ImageSource
from ecos_pl.messages import Encoding, MessageError
from ecos_pl.privacy import PER_SAMPLE, PrivacyUnits


@dataclass(frozen=True)
class Features:
    """Private images in a query's space; rows belong together.

    Attributes:
        points: [n, d] float32.
        units: Whose they are.
        labels: [n] int64, class numbers; empty where no classes were asked about.
    """

    points: Tensor
    units: PrivacyUnits
    labels: Tensor


class PrivateImages:
    """Private images and their embeddings, computed once and kept in the client's folder.

    Args:
        folder: The client's own folder.
        source: The images; ``labels`` hold their classes.
        units: Who counts as one in the guarantee, for the images of ``source`` in order.
        device: Where images are embedded.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images.
    """

    def __init__(
        self,
        folder: Path,
        source: ImageSource,
        *,
        units: PrivacyUnits = PER_SAMPLE,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        self.folder, self.source, self.units = folder, source, units
        self._device, self._batch_size, self._num_workers = device, batch_size, num_workers
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}
        self._of_adapted: set[str] = set()

    def features(self, query: Encoding, encoder: EncoderSpec) -> Features:
        """All readable images in the query's space.

        Raises:
            MessageError: The query's projection does not fit the encoder.
        """
        embeddings, readable = self.embeddings(encoder)
        if embeddings.shape[1] != len(query.mean):
            raise MessageError("the query's projection does not fit the encoder")
        units = self.units.take(readable.numpy())
        return Features(query.project(embeddings), units, torch.empty(0, dtype=torch.int64))

    def labelled(self, query: Encoding, encoder: EncoderSpec, classes: Sequence[str]) -> Features:
        """As `features`, but only images of these classes, with their class numbers."""
        found = self.features(query, encoder)
        _, readable = self.embeddings(encoder)
        number = {name: k for k, name in enumerate(classes)}
        numbers = [number.get(self.source.labels[row] or "", -1) for row in readable.tolist()]
        labels = torch.tensor(numbers, dtype=torch.int64)
        rows = torch.nonzero(labels >= 0).flatten()
        return Features(found.points[rows], found.units.take(rows.numpy()), labels[rows])

    def embeddings(self, encoder: EncoderSpec) -> tuple[Tensor, Tensor]:
        """Embeddings [n, D] of the readable images, and their places [n] in the source.

        An unreadable image is left out without a word: how many there are is private.
        """
        key = encoder.key
        if key not in self._embedded:
            prefix, place = f"embeddings-{key}-", self._place_of(encoder)
            folder = place / f"{prefix}{self.source.fingerprint[:16]}"
            for old in place.glob(f"{prefix}*"):
                if old != folder:  # of the images as they were before some came or went
                    shutil.rmtree(old, ignore_errors=True)
            network = Encoder(encoder).to(self._device)
            bank = build_bank(
                folder,
                self.source,
                network,
                image_size=encoder.image_size,
                batch_size=self._batch_size,
                num_workers=self._num_workers,
                device=self._device,
                title=None,
            )
            parts = [torch.from_numpy(chunk.copy()).float() for _, chunk in bank.chunks()]
            rows = torch.cat(parts) if parts else torch.empty(0, network.num_dims)
            readable = torch.nonzero(~rows.isnan().any(dim=1)).flatten()
            self._embedded[key] = rows[readable], readable
        return self._embedded[key]

    def _place_of(self, encoder: EncoderSpec) -> Path:
        """The folder for an encoder's embeddings; beside its file if the cloud has trained it.

        There may be many of those over time: in memory only the last one's embeddings stay.
        """
        if not encoder.adapted:
            return self.folder
        fingerprint = encoder.fingerprint()[:16]
        for other in self._of_adapted:
            if not other.startswith(fingerprint):
                self._embedded.pop(other, None)
        self._of_adapted = {*(k for k in self._of_adapted if k in self._embedded), encoder.key}
        return Path(encoder.weights).with_suffix("")
