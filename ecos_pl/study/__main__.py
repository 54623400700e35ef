"""Run a study: a grid of runs of train.py, each one a cell, to the end; then table and figures.

The same command goes on after whatever stopped it: what is done is read, what is missing is run,
and what failed is tried again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ecos_pl.overrides import ConfigError, Setting, nearest, parse_command_line
from ecos_pl.study.cells import CONFIG_DIR, REPOSITORY, Cell, cells_of
from ecos_pl.study.display import how_it_failed, shown_progress
from ecos_pl.study.folder import StudyFolder
from ecos_pl.study.report import write_report
from ecos_pl.study.running import Ended, Interrupted, run_cells
from ecos_pl.study.slurm import become, submit, write_script
from ecos_pl.study.study_file import Study, read_study

_EPILOG = """\
results, in the folder of the study:
  results.csv, results.parquet   one line a cell: labels, settings, its summary
  results.md                     the table, which is printed as well
  figures/*.png                  what the study's file asks for
  logs/CELL.log                  what each run printed

exit status: 0 all cells are done; 1 a cell failed; 2 a mistake in the command
or the study's file; 130 Ctrl-C; 143 SIGTERM.

docs/studies.md says how to write a study.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, and return the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_intermixed_args(argv)
    try:
        if (options.submit or options.sbatch) and not options.slurm:
            raise ConfigError("--submit and --sbatch go with --slurm")
        if options.study is None:
            _list_studies()
            status = 0
        else:
            status = _main(options, _settings([*options.settings, *rest]))
        sys.stdout.flush()
        return status
    except Interrupted as interrupted:
        print(f"stopped by {interrupted.by.name}; the same command goes on", file=sys.stderr)
        return 128 + interrupted.by
    except BrokenPipeError:  # whoever read has seen enough, as in `--list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return 128 + signal.SIGPIPE
    except (ConfigError, ValueError) as error:
        print(f"study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace, overrides: Sequence[Setting]) -> int:
    study = read_study(_path_of(options.study))
    folder = StudyFolder(options.out or Path("runs") / "study" / study.name)
    only_looks = options.list or options.render
    if only_looks and not overrides:
        overrides = folder.settings()
    cells = cells_of(study, overrides)
    folder.settle(study.name, overrides, keep=not only_looks)
    folder.check(cells)
    if options.cell is not None:
        become(_named(cells, options.cell), folder)
        return 0
    wanted = _wanted(study, cells, options.only)
    if options.list:
        _list_cells(wanted, folder)
        return 0
    missing = [cell for cell in wanted if folder.state(cell) != "done"]
    if options.slurm:
        _slurm(options, study, overrides, missing, folder)
        return 0
    failed: list[Ended] = []
    if missing and not options.render:
        failed = _run(wanted, missing, folder, options.workers)
    write_report(study, cells, folder)
    for one in failed:
        print(f"FAILED {one.cell.run_id} {how_it_failed(one, folder)}", file=sys.stderr)
    return 1 if failed else 0


def _run(
    wanted: Sequence[Cell], missing: Sequence[Cell], folder: StudyFolder, workers: int
) -> list[Ended]:
    num_done = len(wanted) - len(missing)
    with shown_progress(folder, num_cells=len(wanted), num_done=num_done) as watcher:
        ended = run_cells(missing, folder, workers=workers, watcher=watcher)
    return [one for one in ended if one.status or folder.state(one.cell) != "done"]


def _slurm(
    options: argparse.Namespace,
    study: Study,
    overrides: Sequence[Setting],
    missing: Sequence[Cell],
    folder: StudyFolder,
) -> None:
    todo = [cell for cell in missing if folder.state(cell) != "running"]
    if not todo:
        print("no cell is missing")
        return
    arguments = [str(study.path.resolve()), *(f"{s.key}={s.value}" for s in overrides)]
    arguments += ["--out", str(folder.root.resolve())]
    at_once = options.workers if options.workers > 1 else None
    script = write_script(todo, folder, arguments, options=options.sbatch, at_once=at_once)
    print(f"{len(todo)} cells: {script}")
    print(submit(script) if options.submit else f"submit it with: sbatch {script}")


# --- arguments -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ecos_pl.study",
        description="\n\n".join(_wrapped(paragraph) for paragraph in __doc__.split("\n\n")),
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=22, width=80
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "study",
        nargs="?",
        metavar="NAME_OR_FILE",
        help="a file configs/study/NAME.yaml, or any .yaml file; none: list those there are",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        default=[],
        help="settings of train.py for all cells, over those of the file; a folder holds cells of "
        "one such set",
    )
    parser.add_argument(
        "--workers",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="cells at a time, which share cores and GPUs (default: 1); with --slurm, tasks at a "
        "time",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=LABEL",
        help="run this part of an axis alone, as in --only seed=1; several times: any of an "
        "axis's labels, all axes",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the study (default: runs/study/NAME)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list the cells and their state")
    what.add_argument(
        "--render", action="store_true", help="make table and figures of what is there; run nothing"
    )
    what.add_argument(
        "--slurm",
        action="store_true",
        help="write a job array of the missing cells: slurm.sbatch in the folder",
    )
    what.add_argument(
        "--cell", metavar="CELL", help="run one cell in this process: its name, or its number"
    )
    parser.add_argument(
        "--submit", action="store_true", help="with --slurm: hand the job array to sbatch"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option for the job array, as in --sbatch=--partition=gpu",
    )
    return parser


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(" ".join(paragraph.split()), 80)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _settings(tokens: Sequence[str]) -> list[Setting]:
    for token in tokens:
        if token.startswith("-"):
            flags = [text for action in _parser()._actions for text in action.option_strings]
            raise ConfigError(f"unknown flag {token}{nearest(token, flags)}; --help lists all")
    last = {setting.key: setting for setting in parse_command_line(tokens).settings}
    return list(last.values())


def _path_of(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    if name not in (there := _studies()):
        raise ConfigError(
            f"no study {name!r}{nearest(name, there)} (there are: {', '.join(there) or 'none'})"
        )
    return there[name]


def _studies() -> dict[str, Path]:
    return {path.stem: path for path in sorted((CONFIG_DIR / "study").glob("*.yaml"))}


def _named(cells: Sequence[Cell], name: str) -> Cell:
    by_name = {cell.run_id: cell for cell in cells}
    by_name |= {str(number): cell for number, cell in enumerate(cells, 1)}
    if name not in by_name:
        raise ConfigError(f"--cell {name}: the study has no such cell; --list lists them")
    return by_name[name]


def _wanted(study: Study, cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Cells whose labels are among those asked for."""
    chosen: dict[str, list[str]] = {}
    for text in only:
        axis, equals, label = text.partition("=")
        names = study.axis_names()
        if not equals or axis not in names:
            raise ConfigError(f"--only {text}: write AXIS=LABEL; the axes are {', '.join(names)}")
        labels = list(dict.fromkeys(c.labels[axis] for c in cells if axis in c.labels))
        if label not in labels:
            raise ConfigError(
                f"--only {text}: no such label{nearest(label, labels)} (there are: "
                f"{', '.join(labels)})"
            )
        chosen.setdefault(axis, []).append(label)
    return [
        cell
        for cell in cells
        if all(cell.labels.get(axis) in labels for axis, labels in chosen.items())
    ]


# --- lists ---------------------------------------------------------------------------------------


def _list_studies() -> None:
    print("studies (python -m ecos_pl.study NAME; --help for more)")
    for name, path in _studies().items():
        with path.open(encoding="utf-8") as file:
            about = next((line.lstrip("# ").strip() for line in file if line[:1] == "#"), "")
        print(f"  {name}: {about}")
    print(f"in {(CONFIG_DIR / 'study').relative_to(REPOSITORY)}")


def _list_cells(cells: Sequence[Cell], folder: StudyFolder) -> None:
    counts: dict[str, int] = {}
    for number, cell in enumerate(cells, 1):
        state = folder.state(cell)
        counts[state] = counts.get(state, 0) + 1
        said = f"  {folder.last_line(cell)}" if state == "begun" else ""
        print(f"{number:4} {state:8} {cell.run_id}{said}")
    print(", ".join(f"{count} {state}" for state, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
