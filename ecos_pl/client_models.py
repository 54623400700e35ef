"""Models that the cloud delivered: fetched, checked, kept in the client's folder, and tried."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ecos_pl.client_report import Scorer, evaluation_lines
from ecos_pl.envelope import MessageError
from ecos_pl.images import ImageSource
from ecos_pl.model_file import load_model
from ecos_pl.onnx_file import load_onnx
from ecos_pl.remote_mailbox import ClientMailbox
from ecos_pl.storage import write_bytes

MAX_KEPT = 20
"""Models kept; of more, the oldest go."""


class DeliveredModels:
    """What was delivered to a client, on disk: ``<folder>/<first 12 of SHA-256>-<file name>``.

    Args:
        folder: In the client's folder.
        open_test: Lists the client's test images; None where it has none.
    """

    def __init__(self, folder: Path, open_test: Callable[[], ImageSource] | None) -> None:
        self._folder, self._open_test = folder, open_test
        self._seen: set[str] = set()

    def try_new(self, mailbox: ClientMailbox) -> Iterator[str]:
        """Fetch what was delivered since the last look, and try it on the test images.

        What cannot be used is told of once, and stops nothing.

        Yields:
            Lines for the person at the client, for nobody else.

        Raises:
            MailboxError: The mailbox cannot be reached.
        """
        for delivery_id in mailbox.delivered_models()[-MAX_KEPT:]:
            if delivery_id in self._seen:
                continue
            try:
                path, run_id, is_new = self._fetch(mailbox, delivery_id)
            except MessageError:
                continue  # still on its way, or damaged: looked at again
            self._seen.add(delivery_id)
            if is_new:
                size = path.stat().st_size / 1e6
                yield f"a model was delivered, of run {run_id[:40]}"
                yield f"kept as {self._folder.name}/{path.name} ({size:,.1f} MB)"
                yield from self._tried(path)

    def newest(self, mailbox: ClientMailbox | None = None) -> Path:
        """The model delivered last, fetched from a mailbox if one is given.

        Raises:
            ValueError: There is none, or it is damaged.
            MailboxError: The mailbox cannot be reached.
        """
        if mailbox is not None:
            delivered = mailbox.delivered_models()
            if not delivered:
                raise ValueError(f"no model was delivered yet at {mailbox.shown}")
            return self._fetch(mailbox, delivered[-1])[0]
        kept = self._kept()
        if not kept:
            raise ValueError(
                "no model was delivered to this client yet: name one with --model, or a mailbox "
                "with --mailbox"
            )
        return kept[-1]

    def _fetch(self, mailbox: ClientMailbox, delivery_id: str) -> tuple[Path, str, bool]:
        """Where a delivered model is kept, of which run it is, and whether it is new here."""
        delivery = mailbox.read_delivery(delivery_id)
        path = self._folder / f"{delivery.sha256[:12]}-{delivery.file}"
        if path.is_file() and _sha256(path.read_bytes()) == delivery.sha256:
            return path, delivery.run_id, False
        content = mailbox.read_model(delivery.sha256[:32])
        if (len(content), _sha256(content)) != (delivery.size, delivery.sha256):
            raise MessageError("the delivered model is not the one that was announced")
        write_bytes(path, content)
        for old in self._kept()[:-MAX_KEPT]:
            old.unlink()
        return path, delivery.run_id, True

    def _tried(self, path: Path) -> Iterator[str]:
        if self._open_test is None:
            yield "no test images to try it on (ecos-client init --test)"
            return
        try:
            yield from evaluation_lines(load_delivered(path), self._open_test())
        except Exception as error:  # what others sent must not end the client's loop
            yield f"it cannot be tried: {' '.join(str(error).split()) or type(error).__name__}"

    def _kept(self) -> list[Path]:
        files = [path for path in self._folder.glob("*-*") if path.suffix in _LOADERS]
        return sorted(files, key=lambda path: path.stat().st_mtime_ns)


_LOADERS: dict[str, Callable[[Path], Scorer]] = {".safetensors": load_model, ".onnx": load_onnx}


def load_delivered(path: Path) -> Scorer:
    """Read a delivered model of any kind: ``model.safetensors``, or an ``.onnx`` file.

    Raises:
        ValueError: It is damaged, something else, or needs a package that is missing; the text is
            one line.
    """
    return _LOADERS.get(path.suffix, load_model)(path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
