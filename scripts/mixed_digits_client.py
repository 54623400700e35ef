"""Write the mixed_digits client's images as files, to play the client on a machine of its own.

python scripts/mixed_digits_client.py client_images     # train/CLASS/0000.png and test/CLASS/…
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.mixed_digits import mixed_digits


def main() -> int:
    """Write 1,000 images to train on and 2,000 to test on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made here; must not hold anything yet")
    folder = parser.parse_args().folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        print(f"{folder} exists and is not empty", file=sys.stderr)
        return 2
    scenario = mixed_digits()
    for part, source in (("train", scenario.client_train), ("test", scenario.client_test)):
        assert source is not None
        for index, label in enumerate(source.labels):
            path = folder / part / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.read(index).save(path)
        print(f"{folder / part}: {len(source):,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
