"""Encoders whose backbone the cloud has trained further: what this client accepts, and keeps.

A file that the cloud sends is data of a stranger. It names an architecture that the client trusts
already, whose code is the client's own; it holds tensors alone, all of them finite, and all that
the architecture has; and the encoder that it makes embeds every image on its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ecos_pl.backbone import WeightsError, backbone_names, weights_hash
from ecos_pl.backbone_file import read_backbone
from ecos_pl.encoder import FEATURES, Encoder, EncoderSpec
from ecos_pl.envelope import MessageError
from ecos_pl.mailbox import MissingModelError
from ecos_pl.messages import Encoding
from ecos_pl.per_sample_check import NotPerSampleError, check_per_sample
from ecos_pl.storage import write_bytes

MAX_KEPT = 4
"""Backbones kept at once, with their embeddings; the one used longest ago goes first."""
MIN_SIDE, MAX_SIDE = 16, 512


class AdaptedEncoders:
    """The backbones that a client was sent, on disk: ``<folder>/<sha256>.safetensors``.

    Embeddings made with one lie in ``<folder>/<sha256>/`` and go with it. Whatever is dropped can
    be had again: the cloud's mailbox still holds it.

    Args:
        folder: In the client's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sound: set[str] = set()

    def adopt(self, content: bytes, trusted: Collection[str]) -> None:
        """Check a file as far as that goes without making the network, and keep it.

        Args:
            content: Its bytes.
            trusted: Architectures that the client trusts.

        Raises:
            MessageError: It is not acceptable; nothing was kept.
        """
        try:
            name, state = read_backbone(content)
        except ValueError as error:
            raise MessageError(f"the model that the cloud sent cannot be used: {error}") from error
        if name not in trusted:
            raise MessageError("the model that the cloud sent is of an architecture not trusted")
        if set(state) != set(backbone_names(name)):
            raise MessageError(f"the model that the cloud sent is not a whole {name}")
        self._make_room()
        write_bytes(self._path(hashlib.sha256(content).hexdigest()), content)

    def spec_for(self, query: Encoding, trusted: Collection[str]) -> EncoderSpec:
        """The encoder that a query names, after all checks.

        Raises:
            MissingModelError: Its file must be had first (`adopt`).
            MessageError: It is not acceptable.
        """
        asked = query.encoder
        name, size, sha256 = asked["name"], asked["image_size"], asked["model"]
        if name not in trusted:
            raise MessageError(
                f"the query is for a trained {name[:60]}, an architecture that this client "
                "does not trust"
            )
        if not MIN_SIDE <= size <= MAX_SIDE:
            raise MessageError(f"the encoder's image_size must lie in {MIN_SIDE} to {MAX_SIDE}")
        if asked["features"] not in FEATURES:
            raise MessageError(f"there are no encoder features {asked['features']!r}")
        path = self._path(sha256)
        if not path.is_file() or weights_hash(name, str(path)) != sha256:
            raise MissingModelError(sha256)
        spec = EncoderSpec(name, str(path), size, asked["features"], adapted=True)
        if spec.fingerprint() != query.encoder_fingerprint:
            raise MessageError("the query's fingerprint is not that of the encoder it names")
        self._check(spec, path)
        os.utime(path)
        return spec

    def _check(self, spec: EncoderSpec, path: Path) -> None:
        if spec.key in self._sound:
            return
        try:
            check_per_sample(Encoder(spec), spec.image_size)
        except WeightsError as error:  # its own text names a path of this machine
            path.unlink()
            raise MessageError(f"the model that the cloud sent is no {spec.name}") from error
        except NotPerSampleError as error:
            path.unlink()
            raise MessageError(f"the model that the cloud sent is refused: {error}") from error
        except ValueError as error:  # the architecture does not give these features
            raise MessageError(str(error)) from error
        self._sound.add(spec.key)

    def _make_room(self) -> None:
        kept = sorted(self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        for path in kept[: max(0, len(kept) - MAX_KEPT + 1)]:
            path.unlink()
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.safetensors"
