"""Audit the client's releases as they are installed here.

Every mechanism is run on made-up data: what one sample can change is tested exactly on neighbouring
datasets, its noise and its sampling statistically, and canaries bound ε from below, which may not
exceed the ε claimed by the accountant. No file of yours is read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ecos_pl.audit.checks import ALPHA, AuditFailure
from ecos_pl.audit.lines import Result, all_lines, audit
from ecos_pl.audit.processes import check_processes
from ecos_pl.privacy import check_delta

CONFIDENCE = 0.99
"""With which all lower bounds of the table are right together."""

_EPILOG = """\
Exit status: 0 if every check passed and no lower bound exceeds its claim, 1 if not, 2 for a wrong
option.
"""

_NOTES = """\
ε: add or remove one unit, δ = {delta:g}, PLD accountant. A vote, a screening: one query's.

Lower bounds from {canaries} canaries a line (a quarter for kNN), counted as independent; right all
together with {confidence:.0%} confidence. "any": whatever shape the noise has. "declared": for
noise of the declared shape and unknown size; near the claim, less what chance may hide.

A check fails a sound mechanism with probability {alpha:g}. One that fails leaks more than is
claimed or is not what is documented. One that passes is not thereby private: leakage is bounded
from below, by the data and attacks tried. Timing, logs, other programs, composition over many
answers and flaws smaller than the samples resolve are not seen.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit, print its table and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"argument --json: there is no folder {options.json.parent}")
    num_canaries = options.canaries // (10 if options.quick else 1)
    lines = list(
        all_lines(options.noise_std, options.sample_rate, options.per_person, num_canaries)
    )
    started = time.monotonic()
    results = []
    for number, line in enumerate(lines, start=1):
        about = f"{line.mechanism}, rate {line.release.sample_rate:g}, unit {line.unit}"
        _progress(f"{number}/{len(lines) + 1} {about}")
        # Two bounds a line.
        results.append(audit(line, options.delta, (1 - CONFIDENCE) / (2 * len(lines))))
    _progress(f"{len(lines) + 1}/{len(lines) + 1} other processes")
    failures = [
        f"{result.mechanism}, rate {result.sample_rate:g}, unit {result.unit}, {name}: {text}"
        for result in results
        for name, text in result.failed.items()
    ]
    try:
        check_processes()
        processes = "1 passed"
    except AuditFailure as failure:
        processes = "FAILED"
        failures.append(f"other processes: {failure}")

    print(_table(results))
    print(f"{'other processes':72}{processes:>8}\n")
    print(_notes(options.delta, num_canaries) + "\n")
    for text in failures:
        print(f"FAILED: {text}")
    if options.json is not None:
        _write_json(options.json, results, failures, options.delta)
    count = sum(len(result.passed) + len(result.failed) for result in results) + 1
    verdict = f"FAILED: {len(failures)} of" if failures else "passed:"
    status = 1 if failures else 0
    seconds = time.monotonic() - started
    print(f"{verdict} {count} checks in {seconds:.0f} s, exit status {status}")
    return status


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _notes(delta: float, num_canaries: int) -> str:
    text = _NOTES.format(
        delta=delta,
        canaries=f"{num_canaries:,}",
        confidence=CONFIDENCE,
        alpha=ALPHA,
    )
    return "\n".join(textwrap.fill(paragraph, 80) for paragraph in text.split("\n\n"))


def _write_json(
    path: Path, results: Sequence[Result], failures: Sequence[str], delta: float
) -> None:
    # JSON knows no infinity.
    rows = [
        {name: None if value == math.inf else value for name, value in asdict(result).items()}
        for result in results
    ]
    report = {
        "delta": delta,
        "confidence": CONFIDENCE,
        "false_alarm": ALPHA,
        "results": rows,
        "failures": failures,
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _table(results: Sequence[Result]) -> str:
    """Lay the results out in 80 columns; claims rounded up, bounds rounded down."""
    rows = [
        f"{'':17}{'':6}{'':6}{'':10}{'':10}{'ε at least, if noise is':>25}",
        f"{'mechanism':17}{'noise':>6}{'rate':>6}  {'unit':10}{'ε claimed':>10}{'any':>9}"
        f"{'declared':>10}{'checks':>10}",
    ]
    for r in results:
        verdict = "FAILED" if r.failed else f"{len(r.passed)} passed"
        rows.append(
            f"{r.mechanism:17}{r.noise_std:>6g}{r.sample_rate:>6g}  {r.unit:10}"
            f"{math.ceil(r.claimed * 1e3) / 1e3:>10.3f}{_down(r.bound_any):>9}"
            f"{_down(r.bound_declared):>10}  {verdict:>8}"
        )
    return "\n".join(rows)


def _down(bound: float) -> str:
    return f"{math.floor(bound * 1e3) / 1e3:.3f}" if math.isfinite(bound) else "inf"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ecos_pl.audit",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--noise-std",
        type=_number(1, 1000),
        default=5.0,
        metavar="STD",
        help="noise per unit of what one sample changes, 1 to 1000 (default: 5); at 1, a standard "
        "deviation used as a variance goes unseen",
    )
    parser.add_argument(
        "--sample-rate",
        type=_number(0.01, 1),
        default=0.5,
        metavar="RATE",
        help="Poisson sample rate, 0.01 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--per-person",
        type=_number(1, 100, whole=True),
        default=3,
        metavar="M",
        help="samples of a person where persons are the unit (default: 3; 1 leaves these out)",
    )
    parser.add_argument(
        "--delta",
        type=_delta,
        default=1e-5,
        help="δ at which ε is stated (default: 1e-05)",
    )
    parser.add_argument(
        "--canaries",
        type=_number(1_000, 100_000_000, whole=True),
        default=60_000,
        metavar="N",
        help="canaries a line (default: 60000); the more, the nearer the bounds come to the truth",
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the canaries")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    return parser


def _number(low: float, high: float, *, whole: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = int(text) if whole else float(text)
        except ValueError:
            kind = "whole number" if whole else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {kind}") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must lie in [{low:g}, {high:g}], not {text}")
        return number

    return parse


def _delta(text: str) -> float:
    try:
        return check_delta(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
