import contextlib
import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from datamodules import shard_pieces, tar_shards
from datamodules.shard_list import expand_braces, list_shards
from datamodules.tar_scan import _MemberInfo, scan_shard
from datamodules.tar_shards import TarShards, open_tar_shards
from ecos_pl.images import PoolPart, UnreadableImage, to_tensor

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_shard(
    path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def numbered(first: int, num: int) -> list[tuple[str, bytes]]:
    rows = range(first, first + num)
    return [
        pair
        for i in rows
        for pair in ((f"{i:04d}.png", picture(i)), (f"{i:04d}.cls", str(i % 3).encode()))
    ]


def open_pool(tmp_path: Path, spec: str | Path = "", **options) -> TarShards:
    return open_tar_shards(
        str(spec or tmp_path / "shards"), cache_dir=tmp_path / "cache", **options
    )


def pixels(source: TarShards, row: int) -> np.ndarray:
    return np.asarray(source.read(row))


# --- what is in a shard ---


def test_images_labels_and_domains(tmp_path: Path) -> None:
    facts = {"label": "cat", "domain": "photo", "caption": "a cat"}
    write_shard(
        tmp_path / "shards/a/0.tar",
        [
            ("x.jpg", picture(0, "JPEG")),
            ("x.cls", b" 7\n"),
            ("y.json", json.dumps(facts).encode()),
            ("y.PNG", picture(1)),
            ("y.txt", b"12"),
            ("z.webp", picture(2, "WEBP")),
            ("z.txt", b"12"),
        ],
    )
    write_shard(
        tmp_path / "shards/1.tar",
        [
            ("deep/u.v.w/k.jpeg", picture(3, "JPEG")),
            ("deep/u.v.w/k.txt", b"a caption"),
            ("broken.png", b"no image"),
            ("broken.json", b"{"),
            ("empty.png", b""),
            ("number.json", b'{"cls": 3, "domain": 4}'),
            ("number.png", picture(4)),
            ("list.json", b"[1]"),
            ("list.png", picture(5)),
            ("list.seg.png", picture(6)),
            ("list.jpg", picture(7)),
            ("only_text.txt", b"1"),
            ("__meta__/x.png", picture(8)),
            (".hidden.png", picture(8)),
            ("no_extension", picture(8)),
        ],
    )
    pool = open_pool(tmp_path, licence="CC0-1.0")
    assert list(zip(pool.ids, pool.labels, pool.domains, strict=True)) == [
        ("1.tar/deep/u.v.w/k.jpeg", None, None),
        ("1.tar/broken.png", None, None),
        ("1.tar/empty.png", None, None),
        ("1.tar/number.png", "3", None),
        ("1.tar/list.png", None, None),
        ("a/0.tar/x.jpg", "7", None),
        ("a/0.tar/y.PNG", "cat", "photo"),
        ("a/0.tar/z.webp", "12", None),
    ]
    assert (pixels(pool, 3) == np.asarray(Image.open(io.BytesIO(picture(4))))).all()
    assert pool.read_bytes(-1) == picture(2, "WEBP")
    assert pool.row("a/0.tar", "y") == 6
    assert pool.row("1.tar", "deep/u.v.w/k") == 0
    for shard, key in (("1.tar", "y"), ("2.tar", "y")):
        with pytest.raises(KeyError):
            pool.row(shard, key)
    for row, reason in ((1, "not an image"), (2, "empty")):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            pool.read(row)
        assert pool.ids[row] in str(caught.value)
    assert pool.parts == [PoolPart("shards", "CC0-1.0", 0, 8, pool.fingerprint)]
    assert len(pool) == 8
    assert "8 images in 2 shards" in repr(pool)


@pytest.mark.parametrize("form", FORMATS)
def test_every_tar_format_reads_as_tarfile_extracts(tmp_path: Path, form: str) -> None:
    names = [
        "plain.png",
        "d/" * 40 + "deep.png",
        "sub/with space.png",
        "x" * 90 + "/" + "y" * 9 + ".png",
    ]
    if form != "ustar":  # which has no room for longer names
        names += ["z" * 200 + ".png", "l/" * 300 + "e.png", "日本/猫.png", "new\nline.png"]
    path = write_shard(
        tmp_path / "x.tar", [(name, picture(i)) for i, name in enumerate(names)], FORMATS[form]
    )
    with tarfile.open(path, "a", format=FORMATS[form]) as archive:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, "plain.png"
            archive.addfile(link)
        if form == "pax":
            named = tarfile.TarInfo("short.png")
            named.pax_headers = {"path": "p" * 300 + "/long.png", "comment": "c" * 2000}
            named.size = len(picture(50))
            archive.addfile(named, io.BytesIO(picture(50)))
    pool = open_pool(tmp_path, path)
    with tarfile.open(path) as archive:
        expected = {f"x.tar/{m.name}": archive.extractfile(m).read() for m in archive if m.isreg()}
    assert {name: pool.read_bytes(row) for row, name in enumerate(pool.ids)} == expected
    assert len(pool) == len(names) + (form == "pax")


@settings(max_examples=300, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=150),
    size=st.integers(0, 2**40),
    form=st.sampled_from(list(FORMATS.values())),
    kind=st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE]),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=4),
)
def test_headers_are_read_as_tarfile_reads_them(name, size, form, kind, changes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    with contextlib.suppress(ValueError):  # too long or too large for the format
        for start in range(0, len(headers := member.tobuf(form, "utf-8")), 512):
            header = bytearray(headers[start : start + 512])
            for place, value in changes:
                header[place] = value
            header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
            with contextlib.suppress(tarfile.TarError):
                theirs = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
                ours = _MemberInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
                assert (ours.name, ours.size, ours.type) == (theirs.name, theirs.size, theirs.type)
            header[148] ^= 1  # a wrong checksum
            with pytest.raises(tarfile.HeaderError):
                _MemberInfo.frombuf(bytes(header), "utf-8", "surrogateescape")


def test_shards_made_by_the_tar_command(tmp_path: Path) -> None:
    folder = tmp_path / ("long_" * 30)
    folder.mkdir()
    for i in range(5):
        (folder / f"{'n' * 90}{i}.png").write_bytes(picture(i))
    (tmp_path / "shards").mkdir()
    for form in ("gnu", "pax", "ustar"):
        command = ["tar", f"--format={form}", "-cf", str(tmp_path / f"shards/{form}.tar")]
        subprocess.run([*command, "-C", str(folder), "--sort=name", "."], check=True)
    pool = open_pool(tmp_path)
    assert len(pool) == 15
    assert [pool.read_bytes(row) for row in range(15)] == [picture(i) for i in range(5)] * 3


def test_sparse_members_are_left_out(tmp_path: Path) -> None:
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    (tmp_path / "whole.png").write_bytes(picture(0))
    command = ["tar", "-S", "-cf", str(tmp_path / "x.tar"), "-C", str(tmp_path)]
    subprocess.run([*command, "hole.png", "whole.png"], check=True)
    pool = open_pool(tmp_path, tmp_path / "x.tar")
    assert list(pool.ids) == ["x.tar/whole.png"]
    assert pool.read_bytes(0) == picture(0)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/0.tar", [*numbered(0, 3), ("0001.jpg", picture(9))])
    with pytest.raises(ValueError, match="'0001' in two places") as caught:
        open_pool(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tar"])
def test_compressed_shards_are_refused(tmp_path: Path, name: str) -> None:
    path = write_shard(tmp_path / "0.tar", numbered(0, 3))
    content = path.read_bytes()
    path.unlink()
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"compressed \(gzip\)"):
        open_pool(tmp_path, tmp_path / name)


# --- damage ---


def test_a_truncated_shard_gives_what_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_shard(tmp_path / "whole.tar", numbered(0, 4)).read_bytes()
    path = tmp_path / "shards/0.tar"
    path.parent.mkdir()
    write_shard(tmp_path / "shards/1.tar", numbered(4, 2))
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = [m.offset_data + m.size for m in archive if m.name.endswith("png")]
    for length in (1, 511, 512, 700, 2048, 3000, ends[2] - 1, ends[2], ends[2] + 700, 8700):
        path.write_bytes(whole[:length])
        caplog.clear()
        pool = open_pool(tmp_path)
        num_whole = sum(end <= length for end in ends)
        assert list(pool.ids)[-2:] == ["1.tar/0004.png", "1.tar/0005.png"]
        assert [pool.read_bytes(row) for row in range(len(pool))] == [
            picture(i) for i in [*range(num_whole), 4, 5]
        ]
        records = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(records) <= 1
        if num_whole < 4 and length % 512:
            assert "1 of 2 shards are damaged" in records[0].getMessage()


def test_a_damaged_header_ends_the_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_shard(tmp_path / "shards/0.tar", numbered(0, 4))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        third = archive.getmember("0002.png").offset
    content[third : third + 100] = b"\xff" * 100
    path.write_bytes(content)
    pool = open_pool(tmp_path)
    assert list(pool.ids) == ["0.tar/0000.png", "0.tar/0001.png"]
    assert f"byte {third:,}" in caplog.text


@pytest.mark.parametrize("content", [b"", b"x", b"no tar" * 1000, bytes(512), b"\x80" * 2048])
def test_nothing_readable_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").write_bytes(content)
    with pytest.raises(ValueError, match="no readable images") as caught:
        open_pool(tmp_path)
    assert "\n" not in str(caught.value)


def test_any_damage_is_survived(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", numbered(0, 3), tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 5, 100))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            found = scan_shard(path)
        except ValueError as error:  # a key may become another one's
            if "in two places" in str(error):
                continue
            raise
        for offset, size in zip(found.offsets, found.sizes, strict=True):
            assert 0 < offset <= offset + size <= len(whole)


# --- the index ---


def test_an_index_is_used_again_and_follows_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(3):
        write_shard(tmp_path / f"shards/{shard}.tar", numbered(10 * shard, 4))
    scanned: list[str] = []
    original = shard_pieces.scan_shard
    monkeypatch.setattr(
        shard_pieces, "scan_shard", lambda path: (scanned.append(path.name), original(path))[1]
    )
    first = open_pool(tmp_path)
    again = open_pool(tmp_path)
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar"]
    assert first.fingerprint == again.fingerprint
    write_shard(tmp_path / "shards/1.tar", numbered(50, 2))
    changed = open_pool(tmp_path)
    assert scanned[3:] == ["1.tar"]
    assert len(changed) == 10
    assert changed.read_bytes(4) == picture(50)
    (tmp_path / "shards/2.tar").unlink()
    assert len(open_pool(tmp_path)) == 6
    assert scanned[4:] == []
    os.utime(tmp_path / "shards/0.tar", ns=(1, 1))
    touched = open_pool(tmp_path)
    assert scanned[4:] == ["0.tar"]
    assert len({pool.fingerprint for pool in (first, changed, touched)}) == 3
    (tmp_path / "cache/pools").rename(tmp_path / "gone")
    (tmp_path / "shards").rename(tmp_path / "moved")
    assert open_pool(tmp_path, tmp_path / "moved").fingerprint == touched.fingerprint


def test_damaged_pieces_and_indices_are_made_again(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/0.tar", numbered(0, 4))
    expected = list(open_pool(tmp_path).ids)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        if path.suffix == ".npz":  # is looked at when the index is gone
            next((tmp_path / "cache/pools").glob("tar-*/images/index.json")).unlink()
        assert list(open_pool(tmp_path).ids) == expected, path


BUILD = """
import sys
from pathlib import Path
from datamodules.shard_pieces import Shard, ShardPieces

assert "torch" not in sys.modules  # else every worker would take seconds to start
if __name__ == "__main__":
    shards = []
    for path in sorted(Path(sys.argv[1]).iterdir()):
        stat = path.stat()
        shards.append(Shard(path, path.name, stat.st_size, stat.st_mtime_ns))
    list(ShardPieces(Path(sys.argv[2])).make_all(shards, int(sys.argv[3])))
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_build_goes_on(tmp_path: Path, num_workers: int) -> None:
    for shard in range(30):
        write_shard(tmp_path / f"shards/{shard:02d}.tar", numbered(0, 60))
    pieces = tmp_path / "cache/pools/tar-pieces"
    command = [sys.executable, "-c", BUILD, tmp_path / "shards", pieces, str(num_workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while len(list(pieces.rglob("[!.]*.npz"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)  # ends when all workers have, too: they hold its output
    made = {path: path.stat().st_mtime_ns for path in pieces.rglob("[!.]*.npz")}
    assert len(made) >= 3
    pool = open_pool(tmp_path, num_workers=0)
    assert len(pool) == 1800
    assert all(path.stat().st_mtime_ns == mtime_ns for path, mtime_ns in made.items())
    assert pool.read_bytes(1201) == picture(1)


def test_workers_make_the_same_index(tmp_path: Path) -> None:
    for shard in range(3):
        write_shard(tmp_path / f"shards/{shard}.tar", numbered(10 * shard, 4))
    alone = open_pool(tmp_path, num_workers=0)
    other = open_tar_shards(str(tmp_path / "shards"), cache_dir=tmp_path / "other", num_workers=2)
    assert list(alone.ids) == list(other.ids)
    assert list(alone.labels) == list(other.labels)
    write_shard(tmp_path / "shards/1.tar", [*numbered(0, 1), *numbered(0, 1)])
    with pytest.raises(ValueError, match="in two places"):  # as clear from a worker
        open_tar_shards(str(tmp_path / "shards"), cache_dir=tmp_path / "other", num_workers=2)


# --- reading ---


def test_a_shard_that_changes_is_not_read_wrongly(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shards/0.tar", numbered(0, 4))
    pool = open_pool(tmp_path)
    write_shard(path, numbered(20, 4))
    with pytest.raises(UnreadableImage, match="changed since it was indexed"):
        pool.read(0)
    path.unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        pool.read(0)
    assert len(pool.ids[0]) > 0


def test_an_open_shard_that_is_cut_is_not_read_wrongly(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shards/0.tar", numbered(0, 4))
    pool = open_pool(tmp_path)
    pool.read(0)
    os.truncate(path, 600)
    with pytest.raises(UnreadableImage, match="ends before it"):
        pool.read(3)


def many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TarShards:
    monkeypatch.setattr(tar_shards, "MAX_OPEN_SHARDS", 2)  # so that files are pushed out
    for shard in range(5):
        write_shard(tmp_path / f"shards/{shard}.tar", numbered(10 * shard, 6))
    return open_pool(tmp_path)


def expected_bytes(row: int) -> bytes:
    return picture(10 * (row // 6) + row % 6)


def test_threads_and_a_fork_read_the_right_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = many_shards(tmp_path, monkeypatch)
    wrong: list[int] = []

    def read_some(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            row = rng.randrange(len(pool))
            if pool.read_bytes(row) != expected_bytes(row):
                wrong.append(row)

    threads = [threading.Thread(target=read_some, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    children = []
    for seed in range(3):  # while the lock may be held
        children.append(os.fork())
        if not children[-1]:
            read_some(100 + seed)
            os._exit(len(wrong))
    for thread in threads:
        thread.join()
    assert not wrong
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = many_shards(tmp_path, monkeypatch)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for row in range(len(pool)):
        pool.read(row)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        del pool
        assert len(os.listdir("/proc/self/fd")) <= before


class Pixels(torch.utils.data.Dataset):
    def __init__(self, pool: TarShards) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, row: int) -> torch.Tensor:
        return to_tensor(self.pool.read(row), 6)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pool = many_shards(tmp_path, monkeypatch)
    alone = torch.stack([to_tensor(pool.read(row), 6) for row in range(len(pool))])
    context = multiprocessing.get_context(method)
    num_workers = 2 if method == "fork" else 1  # which imports torch first
    loader = DataLoader(Pixels(pool), 7, num_workers=num_workers, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), alone)


def test_a_pool_is_pickled_as_paths(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/0.tar", numbered(0, 500))
    pool = open_pool(tmp_path, licence="CC0-1.0")
    pool.read(0)
    content = pickle.dumps(pool)
    assert len(content) < 1000
    other = pickle.loads(content)
    assert other.read_bytes(499) == picture(499)
    assert other.parts == pool.parts
    assert other.name == pool.name


# --- lists of shards ---


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x.tar", ["x.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{2..-1}", ["2", "1", "0", "-1"]),
        ("a{b,c{1..2}}d", ["abd", "ac1d", "ac2d"]),
        ("{a,b}{c,}", ["ac", "a", "bc", "b"]),
        ("{00..01}-{x,y}", ["00-x", "00-y", "01-x", "01-y"]),
        ("{name}", ["{name}"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    # As the package braceexpand 0.1.7, which webdataset uses, expands them.
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{", "}", "a{b", "a}b{", "{1..2", "{a,{b}"])
def test_unmatched_braces(pattern: str) -> None:
    with pytest.raises(ValueError, match="do not match"):
        expand_braces(pattern)


def test_lists_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.tar", "a.tar", "sub/c.tar", "00.tar", "01.tar", ".d.tar", "e{1}.tar"):
        write_shard(tmp_path / name, [])
    monkeypatch.chdir(tmp_path)

    def names(spec: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in list_shards(spec)]

    everything = ["00.tar", "01.tar", "a.tar", "b.tar", "e{1}.tar", "sub/c.tar"]
    assert names(".") == names(str(tmp_path)) == everything
    assert names("a.tar") == ["a.tar"]
    assert names("e{1}.tar") == ["e{1}.tar"]
    assert names("{01..00}.tar") == ["01.tar", "00.tar"]
    assert names("[ab].tar") == ["a.tar", "b.tar"]
    assert names("**/c.tar") == ["sub/c.tar"]
    assert names("b.tar::{00,01}.tar") == ["b.tar", "00.tar", "01.tar"]
    (tmp_path / "none").mkdir()
    for spec, reason in [
        ("{00..02}.tar", "no shard '02.tar'"),
        ("x*.tar", r"no shard 'x\*.tar'"),
        ("none", "no .tar files below"),
        ("a.tar::[ab].tar", "listed twice"),
        ("s3://bucket/{0..1}.tar", "mounted path"),
        ("pipe:cat x.tar", "mounted path"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            list_shards(spec)
        assert "\n" not in str(caught.value)
