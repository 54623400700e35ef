"""The run's figures, embedded; each is shown once."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

from ecos_pl.report.blocks import Picture

_PNG = b"\x89PNG\r\n\x1a\n"

_CAPTIONS = {
    "chosen": (
        "Chosen images",
        "A part of the chosen public images, drawn evenly over the regions they come from, with "
        "their labels.",
    ),
    "random": (
        "A random sample of the pool",
        "Public images drawn at random from the whole pool: what training without a choice would "
        "be on.",
    ),
    "coverage": (
        "The client's noisy counts",
        "One bar for each region of the public images: how many of the client's images lie there, "
        "with the client's noise; the line shows how many public images were chosen there.",
    ),
    "rejected": (
        "Images that were not chosen",
        "From the regions that were left out, and from those that were kept.",
    ),
    "embedding_map": (
        "A map of the public images",
        "Each dot is a public image; images that look alike to the encoder lie near each other.",
    ),
    "privacy_ledger": (
        "Privacy loss, answer by answer",
        "ε of all answers so far, after each of them.",
    ),
    "confusion_matrix": (
        "Which classes are taken for which",
        "Simulation: the client's test images by true class and by the network's answer.",
    ),
    "calibration": (
        "How sure the network is, and how often it is right",
        "Simulation: on the client's test images; on the diagonal, both agree.",
    ),
    "training": (
        "Training",
        "Loss, accuracy and learning rate over the training steps, as a picture file.",
    ),
}


class Figures:
    """The PNGs of ``figures/``, taken one after the other."""

    def __init__(self, folder: Path) -> None:
        self._left = {path.stem: path for path in sorted(folder.glob("*.png"))}

    def take(self, name: str) -> Picture | None:
        """The figure of that name, if it is there and was not taken yet."""
        path = self._left.pop(name, None)
        return None if path is None else _picture(path)

    def rest(self) -> list[Picture]:
        """All that were not taken."""
        return [picture for name in list(self._left) if (picture := self.take(name)) is not None]


def _picture(path: Path) -> Picture | None:
    content = path.read_bytes()
    if content[:8] != _PNG or len(content) < 24:
        return None  # not a picture, whatever its name says
    width, height = struct.unpack(">II", content[16:24])
    title = path.stem.replace("_", " ")
    caption, note = _CAPTIONS.get(path.stem, (title[:1].upper() + title[1:], ""))
    return Picture(
        name=path.stem,
        source=f"data:image/png;base64,{base64.b64encode(content).decode()}",
        width=width,
        height=height,
        alt=f"Figure: {note or caption}",
        caption=caption,
        note=note,
    )
