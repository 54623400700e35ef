"""The probe in one, two and four processes: the same bytes on disk, the same images chosen."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from ecos_pl.proxy_set import ProxySet
from tests.rank_processes import end, run_ranks, start_ranks

PROBE = """
import json
from ecos_pl.client import Client
from ecos_pl.client_policy import ClientPolicy
from ecos_pl.encoder import EncoderSpec
from ecos_pl.images import scan_folder
from ecos_pl.mailbox import InProcessMailbox
from ecos_pl.probe import Probe, ProbePlan
from ecos_pl.prototype_labeler import PrototypeLabeler
from ecos_pl.ranks import Ranks

spec = EncoderSpec("mobilenetv3_small_050", "random", 32)
plan = ProbePlan(
    encoder=spec, num_clusters=8, num_dims=8, size=60, noise_std=1.0, max_epsilon=30.0
)
images = Path((folder / "images").read_text())

def make_probe(folder):
    def mailbox_for(fingerprint):
        def client():
            policy = ClientPolicy(
                min_noise_std=0.5, min_noise_multiplier=0.05, max_epsilon=60.0, encoder=spec
            )
            private = scan_folder(images / "client" / "train")
            return Client.simulated(folder / "client", private, policy)
        return InProcessMailbox(client, client_id="c")

    return Probe(
        scan_folder(images / "pool"),
        plan,
        PrototypeLabeler(["horizontal", "vertical"], num_dims=8, num_views=2),
        mailbox_for,
        folder / "cache",
        client_id="c",
        batch_size=16,
    )
"""

RUN = """
with Ranks.of_processes() as ranks:
    result = make_probe(folder).run(ranks)
    print(json.dumps([list(result.proxy_set.ids), result.from_disk]))
"""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> str:
    """Source that gives the 260 images of the test's pool enough chunks and blocks to share."""
    return """
from ecos_pl import compressed_pool, embedding_bank, row_blocks
embedding_bank.CHUNK_ROWS = 32
compressed_pool.PROJECTED_CHUNK_ROWS = 64
row_blocks.BLOCK_ROWS = 48
"""


def prepared(folder: Path, image_tree: Path, answers: Path | None = None) -> Path:
    folder.mkdir()
    (folder / "images").write_text(str(image_tree))
    if answers is not None:
        shutil.copytree(answers, folder / "cache" / "answers")
    return folder


def files(cache: Path) -> dict[str, bytes]:
    """What depends on pool, plan, seed and answers: all but durations and times of files."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name not in ("probe.json", "complete.json")
    }


@pytest.mark.slow
def test_any_number_of_processes_chooses_the_same_images(
    tmp_path: Path, image_tree: Path, small_chunks: str
) -> None:
    alone = prepared(tmp_path / "1", image_tree)
    (output,) = run_ranks(small_chunks + PROBE + RUN, 1, alone)
    for world_size in (2, 4):
        folder = prepared(tmp_path / str(world_size), image_tree, alone / "cache" / "answers")
        outputs = run_ranks(small_chunks + PROBE + RUN, world_size, folder)
        assert outputs == [output] * world_size
        assert files(folder / "cache") == files(alone / "cache")
        assert not (folder / "client").exists()  # all answers were there: nobody was asked


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_the_restart_goes_on(
    tmp_path: Path, image_tree: Path, small_chunks: str
) -> None:
    folder = prepared(tmp_path / "run", image_tree)
    processes = start_ranks(small_chunks + PROBE + RUN, 2, folder)
    chunks = folder / "cache" / "embeddings"
    while not list(chunks.glob("*/*.json")):  # until something is there to be kept
        assert processes[1].poll() is None, processes[1].communicate()
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    (_, log), _ = end(processes, 60)
    assert processes[0].returncode not in (0, -signal.SIGKILL)
    assert "rank 0 lost another rank of this run" in log
    kept = {path: path.stat().st_mtime_ns for path in chunks.glob("*/*.json")}

    outputs = run_ranks(small_chunks + PROBE + RUN, 3, folder)
    assert len(set(outputs)) == 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not embedded again
    (found,) = (folder / "cache" / "probes").glob("*")
    assert len(ProxySet.load(found)) == 60
