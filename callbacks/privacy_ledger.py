"""What the client's releases have cost so far, as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.figures import BLUE, DARK, GREY, new_figure, plain_axes, save_figure
from callbacks.logging_to import log_scalars, log_table
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.accounting import epsilon_of
from ecos_pl.privacy import Release
from ecos_pl.probe_result import ProbeResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("release", "what", "noise multiplier", "sample rate", "times", "epsilon so far")


class PrivacyLedger(ShowsProbe):
    """Logs ``privacy/epsilon``, the table ``privacy/releases``, and ``figures/privacy_ledger.png``.

    After the probe, and anew after each round of labels. It is the cloud's account, of what the
    client declared with each answer; the client's own ledger may hold other runs' releases too.
    It comes after what asks for rounds in the list of callbacks. Nothing where the client released
    nothing, or where no ε holds, since the selection read the client's images.

    Args:
        max_epsilon: What the run's releases may cost together.
    """

    def __init__(self, max_epsilon: float) -> None:
        super().__init__()
        self.max_epsilon = max_epsilon

    @override
    def key(self, found: Probed) -> str:
        return f"{found.result.fingerprint}/{len(found.result.releases)}"

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show_once(trainer)

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        releases = found.result.releases
        if not releases or found.result.privacy["epsilon"] is None:
            return
        spent = epsilons(releases, found.result.privacy["delta"])
        log_scalars(trainer, {"privacy/epsilon": spent[-1], "privacy/num_releases": len(releases)})
        log_table(trainer, "privacy/releases", _COLUMNS, release_rows(releases, spent))
        figure = draw_ledger(found.result, spent, self.max_epsilon)
        save_figure(trainer, figure, "privacy_ledger")


def epsilons(releases: Sequence[Release], delta: float) -> list[float]:
    """ε after each release, of all up to it together."""
    return [epsilon_of(releases[:number], delta) for number in range(1, len(releases) + 1)]


def release_rows(releases: Sequence[Release], spent: Sequence[float]) -> list[list[Any]]:
    """Rows of the table; what is in them, the client has declared."""
    return [
        [
            number,
            _words(release.kind),
            round(release.noise_multiplier, 6),
            release.sample_rate,
            release.repeats,
            round(epsilon, 6),
        ]
        for number, (release, epsilon) in enumerate(zip(releases, spent, strict=True), 1)
    ]


def draw_ledger(result: ProbeResult, spent: Sequence[float], max_epsilon: float) -> Figure:
    """A bar for each release: what had been spent before it, and what it added."""
    releases, places = result.releases, range(1, len(spent) + 1)
    before = [0.0, *spent[:-1]]
    figure = new_figure(max(900, min(2400, 170 * len(spent) + 380)), 570)
    axes = figure.subplots()
    axes.bar(places, before, 0.6, color=GREY, label="spent before")
    added = [now - then for now, then in zip(spent, before, strict=True)]
    axes.bar(places, added, 0.6, bottom=before, color=BLUE, label="added by this release")
    for place, epsilon in zip(places, spent, strict=True):
        axes.annotate(
            f"{epsilon:.3f}",
            (place, epsilon),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.axhline(
        max_epsilon,
        color=DARK,
        linewidth=1.2,
        linestyle="--",
        label=f"limit of this run, {max_epsilon:g}",
    )
    names = [f"{n}: {_words(r.kind)}" for n, r in zip(places, releases, strict=True)]
    axes.set_xticks(list(places), [name.replace(" ", "\n") for name in names])
    axes.set_xlim(0.4, len(spent) + 0.6)
    axes.set_ylim(0, 1.18 * max(max_epsilon, spent[-1]))
    axes.set_xlabel("the client's releases, in order", fontsize=9)
    axes.set_ylabel(f"ε at δ = {result.privacy['delta']:g}", fontsize=9)
    plain_axes(axes)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"privacy spent: {result.statement}", fontsize=10)
    return figure


def _words(kind: str) -> str:
    return kind.replace("_", " ")
