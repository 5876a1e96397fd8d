"""Texts are read one by one, from every kind of file, and faults of files are one line."""

from __future__ import annotations

import json

import pytest

import headwater as hw
from headwater.analyses._corpora import sources
from headwater.analyses._corpora.sources import Source


def read(path, **more) -> list[tuple[int, str, str]]:
    source = Source.of(path, **more)
    found = [(row.number, row.where, row.text) for row in source]
    assert source.count() == len(found)
    return found


def test_jsonl(tmp_path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "one"}\n\n"two"\n{"text": "", "more": [1]}\n{"text": "a\\nb"}')
    assert read(file) == [
        (0, "t.jsonl:1", "one"),
        (1, "t.jsonl:3", "two"),
        (2, "t.jsonl:4", ""),
        (3, "t.jsonl:5", "a\nb"),
    ]


def test_txt_by_file_and_by_paragraph(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("\n\none\r\ntwo\n \n\nthree\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("")
    assert [text for *_, text in read(tmp_path)] == ["first", "\n\none\r\ntwo\n \n\nthree\n", ""]
    assert read(tmp_path, unit="paragraph") == [
        (0, "a.txt:1", "first"), (1, "b.txt:3", "one\r\ntwo"), (2, "b.txt:7", "three"),
    ]  # fmt: skip


def test_parquet_and_a_datasets_folder(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"text {i}" for i in range(600)] + [None]
    table = pa.table({"body": texts, "n": list(range(601))})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    wanted = [(i, f"t.parquet:{i + 1}", text or "") for i, text in enumerate(texts)]
    assert read(tmp_path / "t.parquet", field="body") == wanted
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as out,
        pa.ipc.new_stream(out, table.schema) as to,
    ):
        to.write_table(table, max_chunksize=250)
    assert [text for *_, text in read(folder, field="body")] == [text or "" for text in texts]
    for name, why in (("t.parquet", "no column 'text'"), ("t.parquet", "")):
        if why:
            with pytest.raises(hw.HeadwaterError, match=why):
                list(Source.of(tmp_path / name))
    with pytest.raises(hw.HeadwaterError, match="holds no text"):
        list(Source.of(tmp_path / "t.parquet", field="n"))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "t.parquet").read_bytes()[:500])
    with pytest.raises(hw.HeadwaterError, match="can not be read"):
        list(Source.of(cut, field="body"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"text": 3}\n', "no text under 'text'"),
        (b'{"txt": "a"}\n', "did you mean 'txt'"),
        (b"{\n", "line 1"),
        (b'"\xff"\n', "not UTF-8"),
        (b"[" * 100_000 + b"\n", "line 1"),
        (b'{"text": "a", "text": "b"}\n', "stands twice"),
    ],
)
def test_faults_name_the_line(tmp_path, content, why) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(content)
    with pytest.raises(hw.HeadwaterError, match=why) as error:
        list(Source.of(file))
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def test_a_line_has_a_largest_length(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "MOST_BYTES", 50)
    (tmp_path / "t.jsonl").write_text(json.dumps("a" * 60))
    (tmp_path / "t.txt").write_text("a b\n" * 20)
    for name, unit in (("t.jsonl", "file"), ("t.txt", "file"), ("t.txt", "paragraph")):
        with pytest.raises(hw.HeadwaterError, match="longer than"):
            list(Source.of(tmp_path / name, unit=unit))


def test_what_is_no_corpus_is_refused(tmp_path) -> None:
    (tmp_path / "t.md").write_text("a")
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    inside = tmp_path / "folder"
    inside.mkdir()
    (inside / "link.txt").symlink_to(outside)
    for path in (tmp_path / "t.md", tmp_path / "none", inside, "a\0b"):
        with pytest.raises(hw.HeadwaterError):
            Source.of(path)
