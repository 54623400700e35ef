"""Progress bars for long work: share done, rate, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    title: str | None, total: int | None, unit: str
) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal (nothing elsewhere) and yield ``advance(num_done)``.

    Args:
        title: What is being done, as in ``embedding the pool``; None shows nothing.
        total: How many units there are; None if that is not known.
        unit: What is counted, as in ``images``.
    """
    if title is None or not sys.stderr.isatty():
        yield lambda num_done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            rate = task.finished_speed or task.speed
            return Text("" if rate is None else f"{rate:,.0f} {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda num_done: progress.advance(task, num_done)
