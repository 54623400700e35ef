import shutil

import pytest

from ecos_pl.csv_source import read_csv_source
from ecos_pl.images import UnreadableImage


@pytest.fixture
def folder(image_tree, tmp_path):
    for number in range(3):
        source = image_tree / "client" / "train" / "vertical" / f"secret-{number:03d}.png"
        shutil.copy(source, tmp_path / f"{number}.png")
    return tmp_path


def write(folder, text, encoding="utf-8"):
    path = folder / "images.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_paths_labels_and_persons_are_read_in_order(folder):
    path = write(folder, "who,path,label\nann,2.png,cat\nbob,0.png,\nann,1.png, dog \n")
    source = read_csv_source(path, person_column="who")
    assert source.ids == ["2.png", "0.png", "1.png"]
    assert source.labels == ["cat", None, "dog"]
    assert source.persons == ["ann", "bob", "ann"]
    assert source.domains == [None] * 3
    assert len(source) == 3
    assert source.read(1).size == (24, 24)
    assert "2.png" not in repr(source)
    assert read_csv_source(path).persons is None


def test_a_file_from_a_spreadsheet_is_read(folder):
    path = write(folder, 'path,label\r\n"0.png","a, b"\r\n', "utf-8-sig")
    assert read_csv_source(path).labels == ["a, b"]


def test_no_label_column_means_no_labels(folder):
    assert read_csv_source(write(folder, "path\n0.png\n")).labels == [None]


def test_a_missing_image_is_unreadable_and_stops_nothing(folder):
    source = read_csv_source(write(folder, "path\n0.png\ngone.png\n"))
    assert source.read(0).size == (24, 24)
    with pytest.raises(UnreadableImage):
        source.read(1)


def test_the_fingerprint_follows_rows_and_files(folder):
    path = write(folder, "path,label\n0.png,a\n1.png,b\n")
    first = read_csv_source(path).fingerprint
    assert read_csv_source(path).fingerprint == first
    assert read_csv_source(write(folder, "path,label\n0.png,a\n1.png,c\n")).fingerprint != first
    write(folder, "path,label\n0.png,a\n1.png,b\n")
    (folder / "1.png").write_bytes(b"other")
    assert read_csv_source(path).fingerprint != first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'path'"),
        ("file,label\n0.png,a\n", r"no column 'path' \(its columns: file, label\)"),
        ("path,label\n", "lists no images"),
        ("path,label\n0.png,a\n,b\n", "line 3: no path"),
        ("path,label\n0.png,a\n0.png,b\n", "lists '0.png' twice"),
        ('path\n"0.png\n', "cannot read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_csv_source(write(folder, text))
    assert "\n" not in str(caught.value)


def test_persons_must_be_there_where_they_are_asked_for(folder):
    path = write(folder, "path,who\n0.png,ann\n1.png,\n")
    with pytest.raises(ValueError, match="line 3: no who"):
        read_csv_source(path, person_column="who")
    with pytest.raises(ValueError, match="no column 'patient'"):
        read_csv_source(path, person_column="patient")
    with pytest.raises(ValueError, match="cannot read"):
        read_csv_source(folder / "none.csv")
