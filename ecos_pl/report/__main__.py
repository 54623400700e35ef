"""Write ``report.html`` into folders of finished runs: python -m ecos_pl.report RUN_FOLDER …"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ecos_pl.report.page import write_report


def main(argv: Sequence[str]) -> int:
    """Run from the command line; status 2 if any folder holds no finished run."""
    parser = argparse.ArgumentParser(prog="python -m ecos_pl.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    status = 0
    for folder in parser.parse_args(argv).folders:
        try:
            print(write_report(folder))
        except (OSError, ValueError) as error:
            print(f"ecos_pl.report: {' '.join(str(error).split())}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
