"""What the canvas is sent and what it sends back: the packing, the words, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from headwater.dashboard.canvas import attention_map as module
from headwater.dashboard.canvas.attention_map import described, event_of, masked_out, remark
from headwater.dashboard.canvas.packing import cells_as_sent, packed, text_of
from headwater.dashboard.figures.pooling import Pooled, pool


def causal(side: int, seed: int = 0) -> np.ndarray:
    scores = np.where(
        np.tri(side, dtype=bool), np.random.default_rng(seed).normal(size=(side, side)), -np.inf
    )
    weights = np.exp(scores)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def whole(weights: np.ndarray) -> Pooled:
    return module._pooled(weights, signed=False)


def unpacked(data: bytes) -> tuple[dict, bytes]:
    """By hand, as the browser does it: a length, a header, and numbers on whole words."""
    length = int.from_bytes(data[:4], "little")
    return json.loads(data[4 : 4 + length]), data[4 + -(-length // 4) * 4 :]


@pytest.fixture
def drawn(monkeypatch):
    """Draw without a browser: the header and the numbers that would be sent."""
    sent = []
    monkeypatch.setattr(
        module, "_canvas", lambda **given: sent.append(given) or type("R", (), {"event": None})
    )

    def draw(weights, queries, keys, **settings):
        assert module.attention_map(weights, queries, keys, key="map", **settings) is None
        return unpacked(sent[-1]["data"])

    return draw


@pytest.mark.parametrize("side", [1, 2, 7])
def test_a_causal_square_travels_as_its_lower_triangle(drawn, side):
    weights, tokens = causal(side), [f"t{i}" for i in range(side)]
    header, numbers = drawn(weights, tokens, tokens, causal=True)
    count = side * (side + 1) // 2
    assert header["triangle"] is True
    assert len(numbers) == count * 2 + count % 2 * 2
    values = np.frombuffer(numbers, "<f2", count)
    by_hand = [np.float16(weights[query, key]) for query in range(side) for key in range(query + 1)]
    assert values.tolist() == by_hand


def test_a_rectangle_keeps_its_masked_pairs_as_nan(drawn):
    weights = np.random.default_rng(1).random((3, 5), dtype=np.float32)
    weights[1, 4] = np.nan
    header, numbers = drawn(weights, "abc", "abcde")
    assert header["triangle"] is False
    np.testing.assert_array_equal(np.frombuffer(numbers, "<f2", 15), weights.astype(np.float16).ravel())
    # a window of a causal map: queries 4 to 6 and keys 2 to 6
    window = np.frombuffer(drawn(np.ones((3, 5)), "efg", "cdefg", causal=True, first=(4, 2))[1], "<f2", 15)
    by_hand = [[1.0 if key <= query else np.nan for key in range(2, 7)] for query in range(4, 7)]
    np.testing.assert_array_equal(window.reshape(3, 5), by_hand)


@pytest.mark.parametrize(("largest", "signed"), [(1e6, False), (3e-7, True), (1.0, False)])
def test_no_number_leaves_the_reach_of_float16(largest, signed):
    weights = largest * np.array([[1, 0.5], [-0.3, 0.013]], dtype=np.float32)
    values, factor = cells_as_sent(whole(weights), False, (0, 0), signed)
    np.testing.assert_allclose(values.astype(np.float64) * factor, weights.ravel(), rtol=1e-3)


def test_a_long_map_stays_below_half_a_megabyte(drawn):
    tokens = [f"word{i}" for i in range(2000)]
    pooled = pool(causal(2000))
    long = Pooled(
        np.ones((512, 512), np.float32), np.zeros((512, 512)), np.zeros((512, 512)), 16, (8192, 8192)
    )
    header, numbers = drawn(
        long, ["token"] * 8192, ["token"] * 8192, causal=True, received=np.ones(8192), entropy=np.ones(8192)
    )
    sent = (
        len(numbers)
        + len(json.dumps(header))
        + len(text_of("base.js", "attention_paint.js", "attention_map.js"))
    )
    assert sent < 500_000
    assert len(header["keys"]) == 512
    assert (
        drawn(causal(2000), tokens, tokens, causal=True)[0]["note"]
        == f"each cell = largest weight of {pooled.block} × {pooled.block}"
    )


def test_margins_travel_exactly(drawn):
    received, entropy = np.array([0.1, 0.2, 0.3], np.float32), np.array([1.5, 0.25], np.float32)
    header, numbers = drawn(np.ones((2, 3)), "ab", "abc", received=received, entropy=entropy)
    assert (header["received"], header["entropy"]) == (3, 2)
    np.testing.assert_array_equal(np.frombuffer(numbers, "<f4")[-5:], [*received, *entropy])


def test_hostile_tokens_travel_as_what_is_shown(drawn):
    tokens = ["<img src=x onerror=alert(1)>", "\u202ereversed", "a\nb", "\ud800"]
    header, _ = drawn(np.ones((4, 4)), tokens, tokens)
    assert header["keys"] == ["<img src=x onerror=alert(1)>", "‹202E›reversed", "a⏎b", "�"]
    assert "innerHTML" not in text_of("base.js", "attention_paint.js", "attention_map.js")


def test_the_sentence_says_the_largest_cells():
    weights = np.array([[1.0, 0], [0.25, 0.75]])
    seen = masked_out(whole(weights), True, (3, 3))
    words = described("Head 0.0", seen, (["a", " b"], ["a", " b"]), (3, 3))
    assert words == (
        "Head 0.0. 2 queries, 2 keys. Largest weights: 3 a to 3 a 1, 4 ·b to 4 ·b 0.75, 4 ·b to 3 a 0.25."
    )
    change = described("", whole(np.array([[0.1, -0.4]])), (["a"], ["a", "b"]), signed=True)
    assert change == "1 queries, 2 keys. Largest changes: 0 a to 1 b -0.4, 0 a to 0 a +0.1."


def test_no_change_is_said_and_not_drawn_large(drawn):
    change = np.full((2, 2), 2e-7, dtype=np.float32)
    assert remark(whole(change), True) == "no weight changed by more than 1e-6"
    assert remark(whole(change * 10), True) == ""
    assert remark(whole(np.full((2, 2), np.nan)), False) == "no query sees a key here"
    assert drawn(change, "ab", "ab", signed=True)[0]["floor"] == 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": np.ones((2, 3))}, r"\(2, 3\), and the tokens \(2, 2\)"),
        ({"weights": np.ones(2)}, "must be"),
        ({"received": np.ones(3)}, r"received \[key\] must be \(2,\), and is \(3,\)"),
        ({"entropy": np.ones((2, 2))}, r"entropy \[query\]"),
        ({"scale": "cubic"}, "linear, sqrt, log, clipped"),
        ({"weights": np.ones((0, 0)), "query_tokens": [], "key_tokens": []}, "tokens"),
        ({"weights": Pooled(np.ones((600, 2)), np.ones((600, 2)), np.ones((600, 2)), 1, (600, 2)),
          "query_tokens": ["a"] * 600}, "600 cells"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(drawn, change, said):
    given = {"weights": np.ones((2, 2)), "query_tokens": "ab", "key_tokens": "ab", **change}
    with pytest.raises(ValueError, match=said):
        drawn(given.pop("weights"), given.pop("query_tokens"), given.pop("key_tokens"), **given)


def test_a_click_on_a_block_is_the_pair_behind_it():
    weights = np.zeros((6, 6), np.float32)
    weights[5, 2] = 0.9
    pooled = pool(weights, most=3)  # blocks of two
    assert event_of({"cell": [10 + 4, 20 + 2]}, pooled, (10, 20)) == {"cell": (15, 22)}


@pytest.mark.parametrize(
    ("raw", "event"),
    [
        ({"token": 4, "side": "key"}, {"token": 4, "side": "key"}),
        ({"token": 5, "side": "key"}, None),
        ({"token": 4, "side": "<b>"}, None),
        ({"window": [2, 4, 2, 5]}, {"window": (2, 4, 2, 5)}),
        ({"window": [2, 2, 2, 5]}, None),
        ({"window": [2, 4, 2, 6]}, None),
        ({"window": None}, {"window": None}),
        ({"walk": [0, -1]}, {"walk": (0, -1)}),
        ({"walk": [0, 99]}, None),
        ({"cell": [9, 9]}, None),
        ({"cell": ["0", True]}, None),
        ({"run": [1]}, None),
        ("cell", None),
        (None, None),
    ],
)  # fmt: skip
def test_only_events_that_fit_the_map_are_handed_on(raw, event):
    assert event_of(raw, whole(np.ones((3, 3))), (2, 2)) == event


def test_an_event_reaches_its_handler_once(monkeypatch):
    monkeypatch.setattr(module.st, "session_state", {"map": {"event": {"cell": [1, 0]}}})
    kept: dict = {}
    monkeypatch.setattr(
        module, "_canvas", lambda **given: kept.update(given) or type("R", (), {"event": {"cell": [1, 0]}})
    )
    heard: list[dict] = []
    assert module.attention_map(np.ones((2, 2)), "ab", "ab", key="map", on_event=heard.append) is None
    kept["on_event_change"]()
    assert heard == [{"cell": (1, 0)}]
    assert module.attention_map(np.ones((2, 2)), "ab", "ab", key="map") == {"cell": (1, 0)}


def test_the_header_is_padded_to_whole_words():
    for name in ("", "a", "ab", "abc", "ü"):
        data = packed({"n": name}, [np.ones(3, "<f2"), np.ones(1, "<f4")])
        header, numbers = unpacked(data)
        assert header == {"n": name}
        assert np.frombuffer(numbers[8:], "<f4").tolist() == [1.0]
