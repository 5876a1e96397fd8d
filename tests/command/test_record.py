"""`headwater record`: numbers that agree with the library, files that open again, inputs from three places."""

import json
from pathlib import Path

import numpy as np
import pytest

import headwater as hw

PROMPT = "the cat sat on a mat ."


def test_json_holds_every_statistic_of_the_library(headwater, tiny) -> None:
    run = headwater("record", PROMPT, "-m", tiny, "-s", "entropy", "-s", "received", "--json")
    found = json.loads(run.stdout)["data_vars"]
    expected = hw.load(tiny).record(PROMPT, statistics=("entropy", "received")).to_xarray()
    assert {"entropy", "received"} <= set(found)
    for name in ("entropy", "received"):
        assert found[name]["dims"] == list(expected[name].dims)
        np.testing.assert_allclose(found[name]["data"], expected[name].values, rtol=1e-6)


def test_padding_is_null_in_json_and_left_out_of_the_means(headwater, tiny) -> None:
    run = headwater("record", PROMPT, "the cat", "-m", tiny, "-s", "entropy", "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    entropy = json.loads(run.stdout, parse_constant=refuse)["data_vars"]["entropy"]["data"]
    assert entropy[1][0][0][2] is None
    values = np.array(entropy, dtype=float)
    text = headwater("record", PROMPT, "the cat", "-m", tiny, "-s", "entropy").stdout
    assert text.splitlines()[2].split() == ["0", f"{np.nanmean(values[:, 0]):.4f}"]


def test_a_saved_record_opens_with_the_same_patterns(headwater, tiny, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    assert headwater("record", PROMPT, "-m", tiny, "--layers", "1", "--out", file).exit_code == 0
    opened, direct = hw.Record.open(file), hw.load(tiny).record(PROMPT)
    assert opened.layers == [1]
    np.testing.assert_allclose(opened.pattern(1, 0), direct.pattern(1, 0), atol=1e-6)
    again = headwater("analyze", "rollout", "--record", file, "--json")
    assert again.exit_code == 0, again.stderr


@pytest.mark.parametrize(("text", "expected"), [("0-1", [0, 1]), ("1", [1]), ("1,0", [0, 1])])
def test_layers_are_written_as_a_list_or_a_range(headwater, tiny, text: str, expected: list[int]) -> None:
    run = headwater("record", PROMPT, "-m", tiny, "--layers", text, "--json")
    assert json.loads(run.stdout)["coords"]["layer"]["data"] == expected


@pytest.mark.parametrize("place", ["argument", "file", "stdin", "dash"])
def test_a_prompt_comes_from_any_place(headwater, tiny, tmp_path: Path, place: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"\n{PROMPT}\n\nthe cat\n", encoding="utf-8-sig")
    given = {"argument": [PROMPT, "the cat"], "file": ["--file", file], "stdin": [], "dash": ["-"]}[place]
    stdin = file.read_text(encoding="utf-8-sig") if place in ("stdin", "dash") else ""
    found = json.loads(headwater("record", *given, "-m", tiny, "--json", stdin=stdin).stdout)
    assert np.array(found["data_vars"]["tokens"]["data"]).shape == (2, 7)


def test_a_whole_file_is_one_prompt(headwater, tiny, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the cat\nsat", encoding="utf-8")
    found = json.loads(headwater("record", "--file", file, "--whole", "-m", tiny, "--json").stdout)
    assert np.array(found["data_vars"]["tokens"]["data"]).shape == (1, 3)


def test_edits_of_a_file_are_in_force(headwater, tiny, tmp_path: Path) -> None:
    edit = hw.Knockout(queries="all", keys=[0], heads="0.1")
    file = tmp_path / "edits.json"
    file.write_text(json.dumps({"edits": [edit.to_dict()]}), encoding="utf-8")
    run = headwater("record", PROMPT, "-m", tiny, "-s", "received", "--edits", file, "--json")
    received = np.array(json.loads(run.stdout)["data_vars"]["received"]["data"])
    assert received[0, 0, 1, 0] == 0
    assert received[0, 0, 0, 0] > 0


def test_the_estimate_runs_nothing_and_names_bytes(headwater, tiny) -> None:
    cost = hw.load(tiny).estimate(PROMPT)
    assert (
        json.loads(headwater("record", PROMPT, "-m", tiny, "--estimate", "--json").stdout)["bytes"]
        == cost.bytes
    )


def test_tokens_can_not_drive_the_terminal(headwater, tiny) -> None:
    run = headwater("analyze", "rollout", "the \x1b[31mred cat", "-m", tiny)
    assert run.exit_code == 0
    assert "\x1b" not in run.stdout
    assert "\\x1b[31mred" in run.stdout


def test_prepend_bos_is_that_of_the_library(headwater, tmp_path: Path) -> None:
    for flag, wanted in ((), None), (["--prepend-bos"], True), (["--no-prepend-bos"], False):
        own = hw.load("tasks-4l", prepend_bos=wanted)
        made = json.loads(headwater("record", "Mary gave", *flag, "--json").stdout)
        assert made["data_vars"]["tokens"]["data"] == own.record("Mary gave").tokens.tolist()
        told = json.loads(headwater("analyze", "input_gradient", "Mary gave", *flag, "--json").stdout)
        assert told["attrs"]["first_token"] == own.first_token
    file = tmp_path / "run.safetensors"
    hw.load("tasks-4l").record("Mary gave").save(file)
    refused = headwater("analyze", "rollout", "--record", file, "--prepend-bos")
    assert refused.exit_code == 2
    assert "--prepend-bos is for prompts that are read now" in refused.stderr


def test_layers_that_go_backwards_are_refused(headwater) -> None:
    run = headwater("record", PROMPT, "--layers", "3-1")
    assert run.exit_code == 2
    assert "layers '3-1' go backwards; write them as 1-3" in run.stderr
