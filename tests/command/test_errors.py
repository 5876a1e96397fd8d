"""Bad input is one line on standard error and exit code 2, with nothing on standard output and nothing written."""

import json
import sys
import time
from pathlib import Path

import pytest

from headwater.command import cli

PROMPT = "the cat sat"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["record", PROMPT, "-m", "tasks-4"], ["tasks-4", "tasks-4l"]),
        (["record", "", "-m", "TINY"], ["empty"]),
        (["record", "-m", "TINY"], ["standard input holds no prompt"]),
        (["record", "the " * 40, "-m", "TINY"], ["40", "16"]),
        (["record", PROMPT, "-m", "TINY", "-s", "entropie"], ["entropie", "entropy"]),
        (["record", PROMPT, "-m", "TINY", "--layers", "5"], ["5", "1"]),
        (["record", PROMPT, "-m", "TINY", "--layers", "one"], ["one", "0-3"]),
        (["record", PROMPT, "-m", "TINY", "--keep", "everything"], ["everything", "qk"]),
        (["record", PROMPT, "--file", "absent.txt", "-m", "TINY"], ["twice"]),
        (["record", "--file", "absent.txt", "-m", "TINY"], ["absent.txt", "No such file"]),
        (["record", "--file", ".", "-m", "TINY"], ["not a plain file"]),
        (["record", PROMPT, "-m", "TINY", "--out", "absent/run.safetensors"], ["absent"]),
        (["record", PROMPT, "-m", "tasks-4", "--out", "absent/x"], ["the folder absent does not exist"]),
        (
            ["analyze", "rollout", PROMPT, "-m", "tasks-4", "--html", "absent/x"],
            ["the folder absent does not"],
        ),
        (["analyze", "rolout", PROMPT, "-m", "TINY"], ["rolout", "rollout"]),
        (["analyze", "rollout", PROMPT, "-m", "TINY", "--set", "residul=1"], ["residul", "residual"]),
        (["analyze", "rollout", PROMPT, "-m", "TINY", "--set", "residual=much"], ["much", "a number"]),
        (["analyze", "rollout", PROMPT, "-m", "TINY", "--set", "residual=7"], ["residual=7", "1"]),
        (["analyze", "rollout", PROMPT, "-m", "TINY", "--set", "residual"], ["residual", "=VALUE"]),
        (["analyze", "rollout", PROMPT, "--set", "residual=0", "--set", "residual=1"], ["twice"]),
        (["analyze", "word_ranks", PROMPT, "-m", "TINY"], ["--set words=…", "the words that matter"]),
        (["analyze", "head_roles", PROMPT, "-m", "TINY"], ["model alone"]),
        (["analyze", "head_roles", "--record", "run.safetensors"], ["--record", "head_roles"]),
        (["analyze", "rollout", "--record", "absent.safetensors"], ["absent.safetensors"]),
    ],
    ids=lambda value: " ".join(value[:5])[:60] if isinstance(value, list) else "",
)
def test_one_line_and_two(headwater, tiny, monkeypatch, tmp_path: Path, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    run = headwater(*(tiny if word == "TINY" else word for word in arguments))
    assert run.exit_code == 2, (run.stdout, run.stderr, run.exception)
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["line 1"]),
        (b"[{]", ["line 1, column 3"]),
        (b'[{"edit": NaN}]', ["NaN"]),
        (b'[{"tau": 1, "tau": 2}]', ["tau", "twice"]),
        (b"[" * 100_000, ["not JSON"]),
        (b"\xff\xfe[\x00]\x00", ["UTF-8"]),
        (b'{"hads": []}', ["list of edits"]),
        (b"[" + b" " * 2**21 + b"]", ["larger than"]),
        (json.dumps([{"edit": "Knockot"}]).encode(), ["Knockot"]),
    ],
    ids=["empty", "broken", "NaN", "twice", "deep", "utf-16", "no list", "large", "unknown edit"],
)
def test_edit_files_are_refused_with_the_place(
    headwater, tiny, tmp_path: Path, content: bytes, words
) -> None:
    file = tmp_path / "edits.json"
    file.write_bytes(content)
    run = headwater("record", PROMPT, "-m", tiny, "--edits", file)
    assert run.exit_code == 2, (run.stderr, run.exception)
    assert len(run.stderr.splitlines()) == 1
    for word in words:
        assert word in run.stderr


def test_prompt_files_that_are_no_text_are_refused(headwater, tiny, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"the cat \xff")
    run = headwater("record", "--file", file, "-m", tiny)
    assert run.exit_code == 2
    assert "not UTF-8" in run.stderr


def test_an_unknown_command_is_told_and_two(headwater) -> None:
    run = headwater("analyse")
    assert run.exit_code == 2
    assert "analyze" in run.stderr


def test_ctrl_c_that_compiled_code_drops_is_heard_again(monkeypatch):
    """Seen to fail without the second signal."""

    class Dropping:
        def __del__(self):  # Python drops what is raised in here, and tells the same hook
            raise KeyboardInterrupt

    def work():
        Dropping()
        time.sleep(5)

    monkeypatch.setattr(sys, "argv", ["headwater", "--help"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit):
        cli.main()
    with pytest.raises(KeyboardInterrupt):
        work()
