"""A look at the pool that the proxy set was chosen from."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.figures import save_figure
from callbacks.image_grid import (
    Tile,
    clients_legend,
    draw_grid,
    is_clients,
    shortened,
    thumbnail,
)
from callbacks.probed import Probed, probed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RandomImages(Callback):
    """Writes ``figures/random.png``: images of the whole pool, drawn at random.

    It stands beside ``figures/chosen.png``: what would be trained on without a choice.

    Args:
        num_images: Images shown at most. Those that cannot be read are left out.
    """

    def __init__(self, num_images: int = 36) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        self.num_images = num_images
        self._done: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found = probed(trainer)
        if found is None or found.result.fingerprint in self._done:
            return
        self._done.add(found.result.fingerprint)
        if trainer.is_global_zero:
            figure = draw_random(found, self.num_images)
            if figure is not None:
                save_figure(trainer, figure, "random")


def draw_random(found: Probed, num_images: int) -> Figure | None:
    """The figure, the same at every call; None if no image of the pool can be read."""
    pool, tiles = found.scenario.pool, list[Tile]()
    more = min(len(pool), 2 * num_images)  # where some cannot be read
    for index in random.Random(found.result.fingerprint).sample(range(len(pool)), more):
        if len(tiles) == num_images:
            break
        if (image := thumbnail(found, index)) is not None:
            label, domain = (shortened(one[index] or "") for one in (pool.labels, pool.domains))
            tiles.append(Tile(image, label, domain, is_clients(found, index)))
    if not tiles:
        return None
    known = [
        words
        for words, is_known in (
            ("its own label", any(tile.caption for tile in tiles)),
            ("its domain", any(tile.note for tile in tiles)),
        )
        if is_known
    ]
    title = f"{len(tiles)} of {len(pool):,} images of the pool, drawn at random"
    legend = clients_legend(found)
    return draw_grid([("", tiles)], f"{title}\n{' and '.join(known)}".rstrip(), legend)
