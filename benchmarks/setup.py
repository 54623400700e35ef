"""The whole of `setup()` against its parts, from tar shards to training batches; and once more.

python benchmarks/setup.py                        # 20,000 and 200,000 images: 10 minutes
python benchmarks/setup.py --sizes 1000000 --given   # embeddings given, only few images decoded

The pool lies in tar shards in a temporary folder, which is removed; the client is that of
mixed_digits. Each line is measured in a process of its own. Memory is the largest of any single
process, above the imports.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

NUM_DISTINCT = 4000
"""Pictures that a pool with given embeddings is made of, over and over."""

SPREAD = 0.1
"""Length of what is added to such a picture's embedding, so that no two rows are equal."""


def make_given(folder: Path, num_images: int) -> Path:
    """Write shards of repeated pictures, and an embedding for each image, as clip-retrieval does.

    Returns:
        The folder of the embeddings.
    """
    import torch

    from benchmarks.tar_pool import make_shards
    from ecos_pl.encoder import Encoder, EncoderSpec
    from ecos_pl.images import decode_image, to_tensor

    small = make_shards(folder / "distinct", NUM_DISTINCT, images_per_shard=NUM_DISTINCT)[0]
    with tarfile.open(small) as archive:
        pictures = [
            archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.name.endswith(".jpg")
        ]
    small.unlink()
    spec = EncoderSpec()
    encoder = Encoder(spec)
    rows = []
    for first in range(0, len(pictures), 256):
        some = [
            to_tensor(decode_image(content, "a picture"), spec.image_size)
            for content in pictures[first : first + 256]
        ]
        rows.append(encoder(torch.stack(some)).numpy())
    distinct = np.concatenate(rows)
    rng = np.random.default_rng(0)
    embeddings = folder / "embeddings"
    (embeddings / "img_emb").mkdir(parents=True)
    (embeddings / "metadata").mkdir()
    per_shard = 50_000
    for number, start in enumerate(range(0, num_images, per_shard)):
        places = range(start, min(start + per_shard, num_images))
        with tarfile.open(folder / "shards" / f"{number:05d}.tar", "w") as archive:
            for place in places:
                content = pictures[place % NUM_DISTINCT]
                member = tarfile.TarInfo(f"{place:09d}.jpg")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        noise = rng.standard_normal((len(places), distinct.shape[1])).astype(np.float32)
        noise *= SPREAD / np.sqrt(distinct.shape[1])
        some = distinct[np.arange(start, places.stop) % NUM_DISTINCT] + noise
        np.save(embeddings / "img_emb" / f"img_emb_{number}.npy", some.astype(np.float16))
        _write_ids(embeddings / "metadata" / f"metadata_{number}.parquet", number, places)
    return embeddings


def _write_ids(path: Path, shard: int, places: range) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [f"{shard:05d}.tar/{place:09d}.jpg" for place in places]
    pq.write_table(pa.table({"image_path": ids}), path)


def datamodule(work: Path) -> Any:
    """The probe over the shards in a folder, as train.py would make it."""
    from datamodules.mixed_digits import mixed_digits
    from datamodules.pool_spec import open_pool
    from datamodules.proxy import ProxySamplingDataModule, TrainingView
    from datamodules.scenario import Scenario
    from ecos_pl.probe import ProbePlan
    from ecos_pl.prototype_labeler import PrototypeLabeler

    digits, given = mixed_digits(), work / "embeddings"
    pool = open_pool(str(work / "shards"), cache_dir=work / "cache")
    scenario = Scenario(
        "shards",
        pool,
        digits.client_train,
        digits.client_test,
        digits.classes,
        None if given.is_dir() else "mnist",  # those shards do not say where a picture is from
    )
    return ProxySamplingDataModule(
        scenario,
        ProbePlan(max_epsilon=1.0),
        PrototypeLabeler(digits.classes),
        TrainingView(num_workers=1),
        run_root=work / "runs",
        cache_dir=work / "cache",
        given_embeddings=given if given.is_dir() else None,
    )


def run_setup(work: Path) -> dict[str, Any]:
    """Open, probe, and one pass over the training batches, if it is the first time."""
    import datamodules.pool_spec
    import datamodules.proxy  # noqa: F401
    import ecos_pl.prototype_labeler  # noqa: F401

    imports_mb = _megabytes(resource.RUSAGE_SELF)
    start = time.perf_counter()
    module = datamodule(work)
    module.prepare_data()
    opened = time.perf_counter()
    module.setup("fit")
    done = time.perf_counter()
    result = module.probe_result
    batches = sum(len(images) for images, _, _ in module.train_dataloader())
    trained = time.perf_counter()
    largest = max(map(_megabytes, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    return {
        "open": opened - start,
        "setup": done - opened,
        "parts": result.seconds,
        "from_disk": result.from_disk,
        "batches": batches / (trained - done),
        "purity": module.simulation["purity"],
        "megabytes": largest - imports_mb,
    }


def _megabytes(who: int) -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit / 1e6


def make_pool(work: Path, num_images: int, given: bool) -> None:
    """Make the shards, and the embeddings if they are to be given."""
    (work / "shards").mkdir(parents=True)
    if given:
        make_given(work, num_images)
    else:
        from benchmarks.tar_pool import make_shards

        make_shards(work / "shards", num_images)


def measure(work: Path, num_images: int, given: bool) -> None:
    """Print the table's lines for one pool."""
    # In a process of its own, too: children inherit their parent's peak memory.
    make = [sys.executable, __file__, "--make", str(work), "--sizes", str(num_images)]
    subprocess.run([*make, "--given"] if given else make, check=True)
    for what in ("the first time", "once more"):
        command = [sys.executable, __file__, "--worker", str(work)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        parts = (
            ""
            if found["from_disk"]
            else ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["parts"].items())
        )
        purity = "" if found["purity"] is None else f"{found['purity']:.3f}"
        print(
            f"| {num_images:,} | {what} | {found['open']:.2f} | {found['setup']:.2f} | {parts} "
            f"| {purity} | {found['batches']:,.0f} | {found['megabytes']:,.0f} |",
            flush=True,
        )


def main() -> None:
    """Measure each pool size and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[20_000, 200_000])
    parser.add_argument("--given", action="store_true", help="embeddings are given, not made")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run_setup(options.worker)))
        return
    if options.make:
        make_pool(options.make, options.sizes[0], options.given)
        return
    print("| images | | open, s | setup, s | its parts, s | purity | batches, images/s | MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for num_images in options.sizes:
            measure(Path(work) / str(num_images), num_images, options.given)


if __name__ == "__main__":
    main()
