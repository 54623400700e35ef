"""What crossed between cloud and client, by kind of message."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.logging_to import log_scalars, log_table
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.probe_result import ProbeResult

_COLUMNS = ("kind", "exchanges", "bytes down", "bytes up")


class Communication(ShowsProbe):
    """Logs ``communication/…``: bytes to the client (down) and from it (up), and a table by kind.

    After the probe, and anew after each round of labels, whose backbone is a kind of its own. It
    comes after what asks for rounds in the list of callbacks.
    """

    @override
    def key(self, found: Probed) -> str:
        return f"{found.result.fingerprint}/{len(found.result.exchanges)}"

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show_once(trainer)

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        rows = by_kind(found.result)
        if not rows:
            return
        scalars: dict[str, float] = {}
        for kind, _, down, up in rows:
            scalars |= {f"communication/{kind}/bytes_down": down}
            scalars |= {f"communication/{kind}/bytes_up": up}
        log_scalars(trainer, scalars)
        log_table(trainer, "communication/by_kind", _COLUMNS, rows)


def by_kind(result: ProbeResult) -> list[list[Any]]:
    """Rows ``kind, number of exchanges, bytes down, bytes up``, in order of first use."""
    rows: dict[str, list[Any]] = {}
    for exchange in result.exchanges:
        row = rows.setdefault(exchange["kind"], [exchange["kind"], 0, 0, 0])
        row[1] += 1
        row[2] += exchange["bytes_down"]
        row[3] += exchange["bytes_up"]
    return list(rows.values())
