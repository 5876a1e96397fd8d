"""The state of a session and its address: what is written is read again, and nothing of a stranger's is believed."""

from __future__ import annotations

import json
import random

import pytest
from strange_addresses import settings, strange

from headwater.dashboard.running.runs import edits_of
from headwater.dashboard.state import bound, workspace
from headwater.dashboard.state.address import LONGEST_ADDRESS, from_address, to_address
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError

MODELS = ["small", "other"]
ALL = {
    "model": "other", "text": "a text", "decoder": "an answer", "picture": "sample:one", "part": "vision",
    "answer": 5, "wrong": 7, "kind": "loss", "layer": 2, "head": 3, "query": 4, "key": 1,
    "edits": [{"edit": "Temperature", "tau": 2.0, "heads": "all", "layers": "all", "off": True}],
    "b_text": "another", "b_model": "small", "shown": "difference", "pins": ["1.2", "0.1>1.2"],
    "settings": {"heads.score": "entropy", "head.window": [3, 9], "flow.residual": 0.25, "sinks.own": True},
}  # fmt: skip


def read(parameters: dict[str, str]) -> State:
    return from_address(parameters, MODELS, edits_of)


def test_every_field_travels_in_the_address():
    state = State(**ALL)
    again = read(to_address(state))
    assert again == state
    assert not again.notices


def test_a_view_too_long_for_an_address_is_kept_and_found_after_a_restart():
    state = State(**ALL)
    state.text = "word " * 5000
    state.edits = [{"edit": "Redistribute", "keys": [0], "keep": 0.5, "to": "others", "layers": "all",
                    "heads": [f"{layer}.{head}" for layer in range(12) for head in range(12)]}] * 4  # fmt: skip
    address = to_address(state)
    assert list(address) == ["view"]
    assert read(address) == state
    assert workspace.folder().stat().st_mode & 0o077 == 0
    for file in (workspace.folder() / "views").iterdir():
        file.write_text("{}")  # not what its name says
    assert "not kept" in read(address).notices[0]


def test_a_long_text_alone_stands_under_its_digest():
    state = State(model="small", text="é" * 500)
    address = to_address(state)
    assert "prompt" not in address
    assert read(address).text == state.text
    lost = read(
        address | {"prompt_id": "0" * 32, "edits": '[{"edit": "Temperature", "tau": 2.0}]', "key": "14"}
    )
    assert "without the edits" in lost.notices[0]
    assert (lost.edits, lost.key, lost.text) == ([], None, "")


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ({"layer": "-1"}, "layer"),
        ({"head": "٣"}, "head"),
        ({"model": "../x"}, "not offered"),
        ({"b_model": "../x"}, "not offered"),
        ({"prompt_id": "../../etc/passwd"}, "not kept"),
        ({"view": "../../etc/passwd"}, "not kept"),
        ({"pins": "1.2,x"}, "no head"),
        ({"edits": "[1]"}, "edits"),
        ({"edits": '[{"edit": "Nonsense"}]'}, "Nonsense"),
        ({"edits": '[{"edit": "FreezeAttention", "record": "/etc/passwd"}]'}, "does not open"),
        ({"edits": '[{"edit": "FreezeAttention", "record": "/etc/passwd", "off": true}]'}, "does not open"),
        ({"edits": '[{"edit": "InjectPattern", "pattern": "/etc/x.safetensors"}]'}, "does not open"),
    ],
)
def test_what_does_not_fit_is_replaced_and_told(address, word):
    state = read(address)
    assert any(word in notice for notice in state.notices), state.notices
    assert all("\n" not in notice for notice in state.notices)


@pytest.mark.parametrize(
    "value", ["abc", "1e999", "99999999999999999999", "-5", "[1]", "true", "0.5", '{"a": 1}']
)
def test_a_number_that_no_field_can_show_is_the_default(value):
    state = read({"page.count": value})
    assert bound.held_number(state, "page.count", 1, None, 7) == 7
    assert bound.held_number(read({"page.count": "12"}), "page.count", 1, None, 7) == 12


def test_edits_that_are_off_are_not_applied():
    state = State(model="small", edits=[{"edit": "Temperature", "tau": 2.0, "off": True}])
    assert not state.has_b()
    state.edits[0].pop("off")
    assert state.applied() == [{"edit": "Temperature", "tau": 2.0}]


def test_a_folder_that_can_not_be_written_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADWATER_WORKSPACE", str(tmp_path / "file"))
    state = State(model="small", text="w" * 401)
    address = to_address(state)
    assert address["prompt"] == state.text
    assert "can not be kept" in state.notices[0]
    with pytest.raises(HeadwaterError, match="HEADWATER_WORKSPACE"):
        workspace.keep("texts", b"x")


def test_the_longest_address_is_kept():
    state = State(model="small", settings={f"a.b{n}": "x" * 40 for n in range(40)})
    assert len(json.dumps(to_address(state))) < LONGEST_ADDRESS
    assert read(to_address(state)) == state


@pytest.mark.parametrize("value", ['{"a": 1}', "null", "[" * 20 + "]" * 20, "x" * 4000])
def test_a_setting_that_is_none_gives_way_and_is_told(value):
    state = read({"heads.view": value, "head.window": "[1, 3, 0, 2]"})
    assert state.settings == {"head.window": [1, 3, 0, 2]}
    assert "heads.view" in state.notices[0]


@pytest.mark.parametrize("text", ["null", "5", "[1]", '{"a": 1}', '"x"', "1e400", "true", "two words", ""])
def test_a_text_of_a_page_is_the_same_text_behind_its_address(text):
    state = State(model="small", settings={"catalogue.search": text})
    assert read(to_address(state)).settings == state.settings


def test_no_address_stops_a_page():
    rng, names = random.Random(0), settings()
    for _ in range(2000):
        state = read(strange(rng, names))
        assert all(isinstance(value, str | int | float | list) for value in state.settings.values())
        again = read(to_address(state))
        assert again.settings == state.settings
        assert all(len(notice) < 400 for notice in state.notices)
