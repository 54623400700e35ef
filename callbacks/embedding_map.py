"""The pool in two dimensions: what was chosen of it, and which domains it holds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.figures import DARK, GREEN, GREY, ORANGE, new_figure, save_figure
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.extras import require
from ecos_pl.pool_sample import PoolSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Method = Literal["pca", "umap"]

_DOMAIN_COLOURS = ("#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31")
"""Okabe & Ito's palette without its green, which is the client's, and its yellow and black."""
_NAME_LENGTH = 24  # letters of a domain


class EmbeddingMap(ShowsProbe):
    """Writes ``figures/embedding_map.png``: a sample of the pool's embeddings as a map.

    Left, chosen images among the others; right, where the pool has domains, the same points by
    domain. Distances on a map are not those of the embedding, UMAP's less so than those of PCA.

    Args:
        method: ``pca``: the first two principal components that the probe has found; ``umap``: all
            of its components through UMAP (McInnes et al. 2018), up to a minute.

    Raises:
        ValueError: The package umap-learn is missing.
    """

    def __init__(self, method: Method = "pca") -> None:
        super().__init__()
        if method == "umap":
            require("umap", ["umap"])
        self.method = method

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        sample = found.result.pool_sample
        if sample is not None and len(sample.rows):
            save_figure(trainer, draw_map(found, sample, self.method), "embedding_map")


def draw_map(found: Probed, sample: PoolSample, method: Method) -> Figure:
    """The figure."""
    points = _in_two_dims(sample.points.float(), method)
    chosen = torch.isin(sample.rows, found.result.indices)
    domains = [found.scenario.pool.domains[row] for row in sample.rows.tolist()]
    known = any(domain is not None for domain in domains)
    figure = new_figure(1600 if known else 900, 900)
    panels = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    num_chosen = int(chosen.sum())
    num_others = len(chosen) - num_chosen
    _scatter(
        panels[0],
        points,
        [
            (~chosen, f"not chosen ({num_others:,} shown)", GREY),
            (chosen, f"chosen ({num_chosen:,} shown)", ORANGE),
        ],
    )
    if known:
        _scatter(panels[1], points, _by_domain(domains, found.scenario.client_domain))
    size = int(found.result.cluster_sizes.sum())
    names = {"pca": "principal components 1 and 2", "umap": "UMAP"}
    figure.suptitle(
        f"{len(chosen):,} of {size:,} pool images, embedded by the public encoder: {names[method]}",
        fontsize=10,
    )
    return figure


def _in_two_dims(points: Tensor, method: Method) -> Tensor:
    """[m, 2] of points [m, d]."""
    if method == "pca":
        return torch.nn.functional.pad(points, (0, max(0, 2 - points.shape[1])))[:, :2]
    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed costs speed; that few points are few
        neighbours = max(2, min(15, len(points) - 1))
        found = UMAP(n_neighbors=neighbours, random_state=0).fit_transform(points.numpy())
    return torch.from_numpy(found)


def _by_domain(domains: Sequence[str | None], clients: str | None) -> list[tuple[Tensor, str, str]]:
    """Points, name and colour of the largest domains and of all others; the client's last."""
    counts = Counter(domains)
    named = [name for name, _ in counts.most_common() if name is not None]
    own = [clients] if clients in counts and clients is not None else []
    shown = [name for name in named if name not in own][: len(_DOMAIN_COLOURS)]
    groups = []
    rest = torch.tensor([name not in (*shown, *own) for name in domains])
    if rest.any():
        groups.append((rest, f"other or unknown ({int(rest.sum()):,})", GREY))
    for name, colour in [*zip(shown, _DOMAIN_COLOURS, strict=False), *((n, GREEN) for n in own)]:
        which = torch.tensor([domain == name for domain in domains])
        text = name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"
        note = ": client's domain (simulation)" if name in own else ""
        groups.append((which, f"{text} ({int(which.sum()):,}){note}", colour))
    return groups


def _scatter(axes: Axes, points: Tensor, groups: Sequence[tuple[Tensor, str, str]]) -> None:
    for which, label, colour in groups:
        x, y = points[which].T.tolist() if which.any() else ([], [])
        axes.scatter(x, y, s=5, color=colour, alpha=0.6, linewidths=0, label=_plain(label))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GREY)
    axes.legend(
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=2,
        markerscale=3,
        labelcolor=DARK,
    )


def _plain(text: str) -> str:
    """Without what matplotlib would take for mathematics, or for a hidden entry."""
    return text.replace("$", r"\$").lstrip("_")
