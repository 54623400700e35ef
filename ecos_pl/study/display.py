"""What is seen while a study runs: a bar on a terminal, elsewhere a line for each cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ecos_pl.study.cells import Cell
from ecos_pl.study.folder import StudyFolder
from ecos_pl.study.running import Ended, Watcher


@contextmanager
def shown_progress(folder: StudyFolder, *, num_cells: int, num_done: int) -> Iterator[Watcher]:
    """Yield a watcher that shows cells done and running, and the time left, on stderr.

    Args:
        folder: Of the study.
        num_cells: Cells that are wanted.
        num_done: Of these, done before.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    running: list[str] = []
    failed: set[str] = set()
    seconds: list[float] = []
    start = time.monotonic()
    done = num_done

    def remaining() -> str:
        left = num_cells - done - len(failed)
        if not seconds or not left:
            return ""
        expected = left * (time.monotonic() - start) / (len(seconds))
        return f"about {duration(expected)} left"

    def message() -> str:
        return f"running: {', '.join(running)}" if running else ""

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[running]}", style="dim"),
    )
    is_terminal = sys.stderr.isatty()
    with Progress(*columns, console=console, disable=not is_terminal) as progress:
        task = progress.add_task("cells", total=num_cells, completed=num_done, left="", running="")

        def refresh() -> None:
            progress.update(task, completed=done, left=remaining(), running=message())

        def started(cell: Cell) -> None:
            running.append(cell.run_id)
            refresh()

        def ended(one: Ended) -> None:
            nonlocal done
            name = one.cell.run_id
            running.remove(name)
            seconds.append(one.seconds)
            is_done = one.status == 0 and folder.state(one.cell) == "done"
            if is_done:
                done += 1
                text = f"{done}/{num_cells} {name}: {duration(one.seconds)}"
            else:
                failed.add(name)
                text = f"FAILED {name} {how_it_failed(one, folder)}"
            left = "" if is_terminal else remaining()
            console.print(Text(f"{text}, {left}" if left else text))
            refresh()

        def waiting(cells: Sequence[Cell]) -> None:
            names = ", ".join(cell.run_id for cell in cells)
            console.print(Text(f"waiting for another process that runs {names}"))

        def stopping(num_runs: int) -> None:
            runs = "run saves itself" if num_runs == 1 else "runs save themselves"
            console.print(Text(f"stopping: {num_runs} {runs} (a second Ctrl-C does not wait)"))

        yield Watcher(started, ended, waiting, stopping)


def how_it_failed(ended: Ended, folder: StudyFolder) -> str:
    """Exit status, last line and log of a cell that ended without a result."""
    line = folder.last_line(ended.cell) or "it said nothing"
    return f"(exit status {ended.status}): {line} [{folder.log(ended.cell)}]"


def duration(seconds: float) -> str:
    """A time as it is read.

    >>> duration(42.4), duration(605), duration(7260)
    ('42 s', '10 min', '2 h 1 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
