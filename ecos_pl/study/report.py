"""Write and print what a study came to so far."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ecos_pl.storage import write_bytes
from ecos_pl.study.cells import Cell
from ecos_pl.study.figures import write_figure
from ecos_pl.study.folder import StudyFolder
from ecos_pl.study.results import tidy_rows, write_csv, write_parquet
from ecos_pl.study.study_file import Study
from ecos_pl.study.table import markdown_table


def write_report(study: Study, cells: Sequence[Cell], folder: StudyFolder) -> None:
    """Make table and figures of the cells that are done, and print the table."""
    found = [(cell, folder.summary(cell)) for cell in cells]
    done = [(cell, summary) for cell, summary in found if summary is not None]
    if not done:
        print(f"none of {len(cells)} cells is done: nothing to show", file=sys.stderr)
        return
    text = "\n".join(
        [f"# {study.title}", "", *markdown_table(found, study.table), "", _note(study)]
    )
    text += f"\n{len(done)} of {len(cells)} cells are done.\n"
    rows = tidy_rows(done)
    files = ["results.md", "results.csv"]
    figures = []
    for form in study.figures:
        path = write_figure(found, form, study.table.over, folder.root / "figures")
        if path is not None:
            figures.append(f"figures/{path.name}")
    shown = "\n".join(f"![{figure}]({figure})" for figure in figures)
    write_bytes(
        folder.root / "results.md", (f"{text}\n{shown}" if shown else text).encode() + b"\n"
    )
    write_csv(rows, folder.root / "results.csv")
    if write_parquet(rows, folder.root / "results.parquet"):
        files.append("results.parquet")
    else:
        print("results.parquet is left out: pyarrow is not installed", file=sys.stderr)
    print(text)
    print(f"{folder.root}: {', '.join([*files, *figures])}", file=sys.stderr)


def _note(study: Study) -> str:
    note = "Mean ± standard deviation"
    if study.table.over:
        note += f" over {', '.join(study.table.over)}"
    if any(column.best for column in study.table.columns):
        note += "; in bold the best"
        if study.table.best_within:
            note += f" for each {', '.join(study.table.best_within)}"
        if study.table.reference:
            note += f", without {'; '.join(study.table.reference)}"
    return f"{note}. Purity and accuracies are simulated: measured with ground truth."
