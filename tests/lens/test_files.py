"""Files are read within limits and written whole or not at all.

Seen to fail with the mode of the old file not kept, with links replaced, with files opened in place, and with each
check of the JSON left out.
"""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from headwater import analyses
from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.files import NewFile, bounded, check_target, parse_json, read_text, within, write_text


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("nameless", [True, False])
def test_the_old_file_keeps_its_mode_and_links_go_on_pointing(
    nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    file, link = tmp_path / "real" / "page.html", tmp_path / "link.html"
    file.parent.mkdir()
    write_text(file, "one", HeadwaterError)
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode, "a new file has the mode that any other has"
    file.chmod(0o600)
    link.symlink_to(file)
    assert write_text(link, "zwei ü", HeadwaterError) == link
    assert link.is_symlink()
    assert file.read_text(encoding="utf-8") == "zwei ü"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_a_full_disk_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_text(tmp_path / "a.json", "old", AnalysisError)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        AnalysisError, match=r"can not write .*a.json: No space left on device; give another path"
    ):
        write_text(file, "new", AnalysisError)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_circuit_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_node("embed", kind="embed")
    file = analyses.write_circuit(graph, tmp_path / "circuit.json")
    before = file.read_bytes()
    graph.add_node("logits", kind="logits")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AnalysisError, match="No space left"):
        analyses.write_circuit(graph, file)
    assert file.read_bytes() == before
    with pytest.raises(AnalysisError, match=r"the folder .*absent does not exist"):
        analyses.write_circuit(graph, tmp_path / "absent" / "circuit.json")


def test_an_unfinished_file_is_dropped(tmp_path: Path) -> None:
    with NewFile(tmp_path / "a", HeadwaterError) as new:
        new.file.write(b"half")
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "a", "no does not exist")):
        with pytest.raises(HeadwaterError, match=words):
            check_target(path, HeadwaterError)
    locked = write_text(tmp_path / "locked", "", HeadwaterError)
    locked.chmod(0o444)
    if not os.access(locked, os.W_OK):  # root may write everything
        with pytest.raises(HeadwaterError, match="Permission denied"):
            check_target(locked, HeadwaterError)


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text", HeadwaterError)
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(HeadwaterError, match="no plain file"):
        NewFile(pipe, HeadwaterError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 1"),
        ('{"a": }', "line 1, column 7"),
        ('{"a": 1, "b": 2, "b": 3}', "'b' stands twice in one object"),
        ('{"x": {"a": 1, "a": 2}}', "'a' stands twice"),
        ("[NaN]", "NaN is not a number that JSON knows"),
        ("[-Infinity]", "-Infinity is not"),
        ("[1e999]", "1e999 is too large a number"),
        ("9" * 5000, "not JSON that can be taken"),
        ("[" * 100_000, "not JSON that can be taken"),
    ],
)
def test_strict_json(text: str, words: str) -> None:
    with pytest.raises(AnalysisError) as caught:
        parse_json(text, "a file", AnalysisError)
    assert words in str(caught.value)
    assert str(caught.value).startswith("a file")
    assert "\n" not in str(caught.value)


def test_reading_is_bounded_and_one_line_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(file, 6, HeadwaterError) == "abc"
    with pytest.raises(HeadwaterError, match=r"a.txt is larger than .* MiB; give less"):
        read_text(file, 5, HeadwaterError, "give less")
    assert bounded(io.BytesIO(b"abc"), "standard input", 3, HeadwaterError) == b"abc"
    file.write_bytes(b"a\xff")
    with pytest.raises(HeadwaterError, match=r"is not UTF-8 text \(byte 1\)"):
        read_text(file, 5, HeadwaterError)
    for path, words in (
        (tmp_path, "not a plain file"),
        (tmp_path / "absent", "No such file"),
        (Path("a\0b"), "null"),
        (Path("a" * 300), "too long"),
    ):
        with pytest.raises(HeadwaterError, match=words) as caught:
            read_text(path, 5, HeadwaterError)
        assert "\n" not in str(caught.value)


def test_a_name_stays_within_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    for name in ("..", "../out", "link/out", str(tmp_path / "in" / "a"), "a\0b"):
        assert within(tmp_path / "in", name) is None
    assert within(tmp_path / "in", "a/../b") == (tmp_path / "in" / "b").resolve()


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    file = tmp_path / "big.bin"
    code = (
        "import os, signal, sys; from pathlib import Path; del os.O_TMPFILE\n"
        "from headwater.lens.files import NewFile; from headwater.lens.errors import HeadwaterError\n"
        "new = NewFile(Path(sys.argv[1]), HeadwaterError); new.file.write(bytes(10**6)); new.file.flush()\n"
        "print('written', flush=True); sys.stdin.readline() if sys.argv[2] == 'wait' else None\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [sys.executable, "-c", code, str(file)]
    subprocess.run([*arguments, "die"], stdout=subprocess.DEVNULL)
    assert len(list(tmp_path.glob(".big.bin.*.part"))) == 1
    with subprocess.Popen([*arguments, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        assert living.stdout is not None
        living.stdout.readline()
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "O_TMPFILE")
            write_text(file, "whole", HeadwaterError)
        assert len(list(tmp_path.glob(".big.bin.*.part"))) == 1, "the one that is being written stays"
        living.kill()
    assert file.read_text() == "whole"
