"""Embeddings made elsewhere: each format as its maker writes it, each fault in one line."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from ecos_pl import embedding_bank, embedding_files, precomputed
from ecos_pl.embedding_bank import build_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import UnreadableImage
from ecos_pl.precomputed import precomputed_bank, precomputed_fingerprint

N = 45
IDS = [f"{'cat' if i % 2 else 'dog'}/{i:04d}.jpg" for i in range(N)]


class Source:
    """Pictures of noise; the third cannot be read."""

    def __init__(self, ids=IDS):
        self.name, self.fingerprint, self.ids = "noise", "ab", ids
        self.labels, self.domains = [None] * len(ids), [None] * len(ids)

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        if index == 2:
            raise UnreadableImage("cannot read 2")
        rng = np.random.default_rng(index)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        return coarse.resize((32, 32))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(EncoderSpec(image_size=32))


@pytest.fixture(scope="module")
def own(encoder, tmp_path_factory):
    """[N, D] float32: the encoder's own embeddings; of image 2 as others' decoder may have it."""
    bank = build_bank(tmp_path_factory.mktemp("own"), Source(), encoder, image_size=32)
    rows = bank[:].astype(np.float32)
    rows[2] = rows[1]
    return rows


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(embedding_bank, "CHUNK_ROWS", 10)
    monkeypatch.setattr(embedding_files, "BLOCK_ROWS", 7)
    monkeypatch.setattr(precomputed, "NUM_COMPARED", 12)


def clip_retrieval(folder, ids, rows):
    for part, chosen in enumerate(np.array_split(np.arange(len(ids)), 3)):
        for name in ("img_emb", "text_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / f"img_emb/img_emb_{part}.npy", rows[chosen].astype(np.float16))
        np.save(folder / f"text_emb/text_emb_{part}.npy", -rows[chosen])
        table = {"image_path": [ids[i] for i in chosen], "caption": ["x"] * len(chosen)}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{part}.parquet")
    return folder


def datacomp(folder, ids, rows):
    folder.mkdir()
    for part, chosen in enumerate(np.array_split(np.arange(len(ids)), 2)):
        half = rows[chosen].astype(np.float16)
        arrays = {"l14_img": half, "l14_txt": -half, "b32_img": half[:, :9], "b32_txt": half[:, :9]}
        np.savez_compressed(folder / f"{part:08d}.npz", **arrays)
        table = {"uid": [ids[i] for i in chosen], "url": ["x"] * len(chosen)}
        pq.write_table(pa.table(table), folder / f"{part:08d}.parquet")
    return folder


def npy_and_text(folder, ids, rows):
    folder.mkdir()
    np.save(folder / "clip.npy", np.asfortranarray(rows))
    (folder / "clip.txt").write_text("\n".join(ids) + "\n")
    return folder / "clip.npy"


def npy_and_json(folder, ids, rows):
    folder.mkdir()
    np.save(folder / "clip.npy", rows.astype(np.float64))
    (folder / "clip.json").write_text(json.dumps(ids))
    return folder


def safetensors_and_text(folder, ids, rows):
    folder.mkdir()
    save_file({"other": np.zeros(3), "embeddings": rows}, folder / "x.safetensors")
    (folder / "x.txt").write_text("\n".join(ids))
    return folder / "x.safetensors"


def safetensors_with_ids(folder, ids, rows):
    folder.mkdir()
    tensors = {"embeddings": torch.from_numpy(rows).bfloat16()}
    save_torch(tensors, folder / "x.safetensors", metadata={"ids": json.dumps(ids)})
    return folder


def parquet_of(list_type):
    def write(folder, ids, rows):
        folder.mkdir()
        for part, chosen in enumerate(np.array_split(np.arange(len(ids)), 2)):
            lists = pa.array(rows[chosen].tolist(), list_type(rows.shape[1]))
            table = pa.table({"id": [ids[i] for i in chosen], "embedding": lists})
            pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=13)
        return folder

    return write


FORMATS = {
    "clip-retrieval": clip_retrieval,
    "datacomp": datacomp,
    "npy and text": npy_and_text,
    "npy and json": npy_and_json,
    "safetensors and text": safetensors_and_text,
    "safetensors with ids": safetensors_with_ids,
    "parquet lists": parquet_of(lambda dims: pa.list_(pa.float32())),
    "parquet large lists": parquet_of(lambda dims: pa.large_list(pa.float64())),
    "parquet fixed lists": parquet_of(lambda dims: pa.list_(pa.float32(), dims)),
}


def shuffled(ids, rows, seed=0, scale=3.0):
    order = np.random.default_rng(seed).permutation(len(ids))
    return [ids[i] for i in order], scale * rows[order]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_rows_back(tmp_path, own, encoder, kind):
    path = FORMATS[kind](tmp_path / "given", *shuffled(IDS, own))
    bank = precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    tolerance = 8e-3 if "with ids" in kind else 1e-3  # bfloat16
    assert np.allclose(bank[:], own, atol=tolerance)
    assert np.allclose(np.linalg.norm(bank[:].astype(np.float32), axis=1), 1, atol=2e-3)
    assert bank.missing_chunks() == []
    assert bank.unreadable().tolist() == []
    names = {file.name for file in (tmp_path / "bank").iterdir()}
    assert names == {
        "complete.json",
        *(f"rows_{first:010d}.{end}" for first in range(0, 45, 10) for end in ("npy", "json")),
    }


@pytest.mark.parametrize(
    "given",
    [
        lambda text: f"/data/pool/{text}",
        lambda text: text[4:8],
        lambda text: f"00012/{text[4:8]}",
        lambda text: f"else/where/{text[4:8]}.webp",
    ],
)
def test_ids_that_differ_in_folders_or_suffix_match(tmp_path, own, encoder, given):
    ids, rows = shuffled(IDS, own)
    path = npy_and_text(tmp_path / "given", [given(text) for text in ids], rows)
    bank = precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    assert np.allclose(bank[:], own, atol=1e-3)


def test_equal_names_in_several_folders_match_by_their_folders(tmp_path, own, encoder):
    ids = [f"{'cat' if i % 2 else 'dog'}/{i // 2}.jpg" for i in range(N)]
    path = npy_and_text(tmp_path / "given", [f"/home/pool/{text}" for text in ids], own)
    bank = precomputed_bank(path, Source(ids), encoder, tmp_path / "bank")
    assert np.allclose(bank[:], own, atol=1e-3)


def test_a_pool_that_is_a_folder_of_what_was_embedded(tmp_path, own, encoder):
    more = [*(f"/d/a/{text}" for text in IDS), *(f"/d/b/{text}" for text in IDS)]
    path = npy_and_text(tmp_path / "given", more, np.concatenate([own, -own]))
    ids = [f"a/{text}" for text in IDS]
    bank = precomputed_bank(path, Source(ids), encoder, tmp_path / "bank")
    assert np.allclose(bank[:], own, atol=1e-3)


def test_the_column_is_found_by_what_matches(tmp_path, own, encoder):
    folder = tmp_path / "given"
    folder.mkdir()
    np.save(folder / "x.npy", own)
    table = {"id": list(range(1000, 1000 + N)), "key": IDS, "uid": ["u"] * N}
    pq.write_table(pa.table(table), folder / "x.parquet")
    bank = precomputed_bank(folder, Source(), encoder, tmp_path / "bank")
    assert np.allclose(bank[:], own, atol=1e-3)


def test_images_without_embedding_count_as_unreadable(tmp_path, own, encoder, caplog):
    path = npy_and_text(tmp_path / "given", IDS[:30], own[:30])
    with caplog.at_level(logging.WARNING):
        bank = precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    assert bank.unreadable().tolist() == list(range(30, N))
    assert "15 of 45 images of noise have no embedding" in caplog.text


def test_a_complete_bank_needs_the_files_no_more(tmp_path, own, encoder):
    path = npy_and_text(tmp_path / "given", IDS, own)
    precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    path.unlink()
    bank = precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    assert np.allclose(bank[:], own, atol=1e-3)


def test_a_damaged_chunk_is_made_again(tmp_path, own, encoder):
    path = datacomp(tmp_path / "given", IDS, own)
    precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    chunk = tmp_path / "bank/rows_0000000020.npy"
    before = chunk.read_bytes()
    chunk.write_bytes(before[:-1] + b"\x07")
    precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    assert chunk.read_bytes() == before


def test_the_fingerprint_is_that_of_the_files(tmp_path, own):
    path = clip_retrieval(tmp_path / "given", IDS, own)
    before = precomputed_fingerprint(path)
    path.rename(tmp_path / "moved")
    assert precomputed_fingerprint(tmp_path / "moved") == before
    metadata = tmp_path / "moved/metadata/metadata_1.parquet"
    os.utime(metadata, ns=(0, 1))
    assert precomputed_fingerprint(tmp_path / "moved") != before


# --- faults ------------------------------------------------------------------------------------


def refused(path, encoder, tmp_path, ids=IDS):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        precomputed_bank(path, Source(ids), encoder, tmp_path / "bank")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bank/complete.json").exists()
    return str(caught.value)


def test_another_encoder_is_refused(tmp_path, own):
    path = npy_and_text(tmp_path / "given", IDS, own)
    message = refused(path, Encoder(EncoderSpec(image_size=96)), tmp_path)
    assert "these embeddings were not made by tf_efficientnet_lite0 (auto) at 96 px" in message


def test_rows_of_the_wrong_images_are_refused(tmp_path, own, encoder):
    path = npy_and_text(tmp_path / "given", IDS, np.roll(own, 1, axis=0))
    assert "were not made by" in refused(path, encoder, tmp_path)


def cut(path, num):
    path.write_bytes(path.read_bytes()[:-num])


def fault(name):
    return lambda function: FAULTS.append((name, function)) or function


FAULTS = []


@fault("do not exist")
def _(folder, rows):
    return folder / "nowhere"


@fault("no embeddings in")
def _(folder, rows):
    folder.mkdir()
    return folder


@fault("must be one of .npy .npz .safetensors .parquet or a folder")
def _(folder, rows):
    folder.mkdir()
    (folder / "x.csv").write_text("")
    return folder / "x.csv"


@fault("x.npy comes without ids: add x.txt")
def _(folder, rows):
    folder.mkdir()
    np.save(folder / "x.npy", rows)
    return folder


@fault("holds 44 ids for the 45 rows of")
def _(folder, rows):
    return npy_and_text(folder, IDS[:-1], rows)


@fault("holds 46 ids for the 45 rows of")
def _(folder, rows):
    return npy_and_text(folder, [*IDS, "x"], rows)


@fault("clip.npy cannot be read")
def _(folder, rows):
    path = npy_and_text(folder, IDS, rows)
    cut(path, 5)
    return path


@fault("x.safetensors cannot be read")
def _(folder, rows):
    path = safetensors_and_text(folder, IDS, rows)
    cut(path, 5)
    return path


@fault("has no tensor 'embeddings' (there are: other)")
def _(folder, rows):
    path = safetensors_and_text(folder, IDS, rows)
    save_file({"other": rows}, path)
    return path


@fault("no ids: add x.txt, one id per line")
def _(folder, rows):
    path = safetensors_and_text(folder, IDS, rows)
    path.with_suffix(".txt").unlink()
    return path


@fault("00000001.npz cannot be read")
def _(folder, rows):
    path = datacomp(folder, IDS, rows)
    cut(path / "00000001.npz", 9)
    return path


@fault("has no array of image embeddings in 1280 dimensions: b32_img [45, 9]")
def _(folder, rows):
    folder.mkdir()
    np.savez(folder / "0.npz", b32_img=rows[:, :9])
    pq.write_table(pa.table({"uid": IDS}), folder / "0.parquet")
    return folder


@fault("part-0.parquet cannot be read")
def _(folder, rows):
    path = FORMATS["parquet lists"](folder, IDS, rows)
    cut(path / "part-0.parquet", 9)
    return path


@fault("are not all of 1280 numbers")
def _(folder, rows):
    folder.mkdir()
    lists = rows.tolist()
    lists[9] = lists[9][:-1]
    pq.write_table(pa.table({"id": IDS, "emb": lists}), folder / "x.parquet")
    return folder


@fault("no column of lists of numbers: id, caption")
def _(folder, rows):
    folder.mkdir()
    pq.write_table(pa.table({"id": IDS, "caption": IDS}), folder / "x.parquet")
    return folder


@fault("has no column of ids: none of id, image_path")
def _(folder, rows):
    folder.mkdir()
    pq.write_table(pa.table({"name": IDS, "emb": rows.tolist()}), folder / "x.parquet")
    return folder


@fault("holds embeddings in 9 dimensions; the encoder gives 1280")
def _(folder, rows):
    return npy_and_text(folder, IDS, rows[:, :9])


@fault("holds NaN or infinity in row 17")
def _(folder, rows):
    rows = rows.copy()
    rows[17, 3] = np.inf
    return npy_and_text(folder, IDS, rows)


@fault("holds 1 ids more than once, 'dog/0004.jpg' say (equal ids)")
def _(folder, rows):
    return npy_and_text(folder, [*IDS[:-1], IDS[4]], rows)


@fault("has no embedding for 25 of 45 images of noise: ids there are like 'dog/0000.jpg'")
def _(folder, rows):
    return npy_and_text(folder, IDS[:20], rows[:20])


@fault("has no embedding for 45 of 45 images of noise: ids there are like 'x0', the pool's like 'd")
def _(folder, rows):
    return npy_and_text(folder, [f"x{i}" for i in range(N)], rows)


@pytest.mark.parametrize(("message", "make"), FAULTS, ids=[name[:30] for name, _ in FAULTS])
def test_each_fault_gives_one_line(tmp_path, own, encoder, message, make):
    assert message in refused(make(tmp_path / "given", own), encoder, tmp_path)


def test_last_parts_that_are_not_unique_in_the_pool_say_so(tmp_path, own, encoder):
    ids = [f"{'cat' if i % 2 else 'dog'}/{i // 2}.jpg" for i in range(N)]
    path = npy_and_text(tmp_path / "given", [f"x/{i}" for i in range(N)], own)
    message = refused(path, encoder, tmp_path, ids)
    assert "last parts match, but are not unique in the pool" in message


KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from ecos_pl import embedding_bank
embedding_bank.CHUNK_ROWS = 10
from ecos_pl.chunk_file import ChunkFile
from test_precomputed import Encoder, EncoderSpec, Source, precomputed_bank
write = ChunkFile.write
def write_or_die(self, rows):
    if self.rows.start == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, rows)
ChunkFile.write = write_or_die
given, bank = map(Path, sys.argv[1:])
precomputed_bank(given, Source(), Encoder(EncoderSpec(image_size=32)), bank)
"""


def test_killed_it_goes_on(tmp_path, own, encoder):
    path = datacomp(tmp_path / "given", *shuffled(IDS, own))
    whole = precomputed_bank(path, Source(), encoder, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "bank")]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "bank/rows_0000000020.json").is_file()
    assert not (tmp_path / "bank/rows_0000000030.npy").exists()
    bank = precomputed_bank(path, Source(), encoder, tmp_path / "bank")
    assert (bank[:] == whole[:]).all()
