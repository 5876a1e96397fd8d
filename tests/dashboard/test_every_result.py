"""The table of all analyses: each result has a figure with a title, named axes and its unit, which holds its numbers.

Seen to fail with the unit left out of curves, and with a slice of each menu dropped.
"""

from __future__ import annotations

import functools
import html
import json
import random
from pathlib import Path
from typing import Any

import drawn_canvases
import networkx as nx
import numpy as np
import pytest
import xarray as xr

import headwater as hw
from headwater.analyses._catalogue.catalogue import catalogue
from headwater.command import matrix_calls
from headwater.data.pictures import films

OTHERS = {
    "patch_distance": "dinov2",
    "image_contributions": "vit",
    "pruning_curve": "vit",
    "token_importance": "vit",
    "head_effects": "vit_classifier",
    "word_on_picture": "llava",
    "region_words": "llava",
    "attention_knockout": "llava",
    "localised_reading": "llava",
    "image_compression": "llava",
    "token_divergence": "llava",
    "position_swap": "gpt2",
    "output_gates": "qwen3_next",
}  # else a small Llama
# what compares pictures with captions needs a tokenizer and captions, which no model of the zoo has
ON_CLIP = ("text_span", "text_heatmap", "segmentation", "contribution_ablation")
QUICK = (
    "rollout",
    "head_roles",
    "edge_attribution",
    "find_sinks",
    "agreement",
    "patch_distance",
    "acdc",
    "sink_norms",
)

subject = functools.cache(matrix_calls.subject)


def rows() -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in catalogue()]


def numbers_of(result: Any) -> np.ndarray:
    """Every finite number of a result."""
    if isinstance(result, nx.Graph):
        return np.array([])
    arrays = result.data_vars.values() if isinstance(result, xr.Dataset) else [result]
    found = [np.asarray(array.values, dtype=float).ravel() for array in arrays if array.dtype.kind in "fiub"]
    flat = np.concatenate(found) if found else np.array([])
    return flat[np.isfinite(flat)]


def numbers_drawn(drawn: Any) -> np.ndarray:
    """Every finite number of the maps, bars and curves of a figure, those behind its menu included."""
    found = []
    for trace in drawn.data:
        values = trace.z if trace.type == "heatmap" else trace.y if trace.type in ("bar", "scatter") else None
        if (
            values is not None
            and getattr(trace, "mode", "") not in ("text", "markers")
            and not (trace.type == "heatmap" and trace.text is not None and "%{z" not in trace.hovertemplate)
        ):
            found.append(np.asarray(values, dtype=float).ravel())
    flat = np.concatenate(found) if found else np.array([])
    return flat[np.isfinite(flat)]


def words_of(drawn: Any) -> str:
    """Titles, subtitles, axes and colour bars; not what only hovering shows."""
    told = json.loads(drawn.to_json())
    bars = [trace.get("colorbar") for trace in told["data"]]
    return html.unescape(json.dumps([told["layout"], bars], ensure_ascii=False)).replace("<br>", " ")


def on_clip(name: str) -> Any:
    """The result of an analysis of captions, on four canvases of digits."""
    found = drawn_canvases.drawn(4, 1)
    place, places = drawn_canvases.first(found), drawn_canvases.PLACES
    given = {
        "contribution_ablation": {"classes": places, "labels": place, "draws": 10},
        "segmentation": {
            "texts": [places[n] for n in place], "against": places, "draws": 10,
            "masks": [each.mask(n).tolist() for each, n in zip(found, place, strict=True)],
        },
    }.get(name, {"texts": places})  # fmt: skip
    shots = [each.picture() for each in found]
    return catalogue()[name].function(hw.load("clip-digits"), shots, **given)


def on_video(name: str) -> Any:
    """The result of an analysis of films, on two of them."""
    model, rng = hw.load("video-digits"), random.Random(0)
    shots = [hw.Example(image=films.film(rng).frames()) for _ in range(2)]
    return (
        hw.analyses.space_time(model.record(shots))
        if name == "space_time"
        else catalogue()[name].function(model, shots)
    )


def on_drawings(name: str) -> Any:
    """The result of an analysis of a model that draws, on two prompts."""
    concepts = {"digit": "bright {one|two} left", "place": "bright three {left|right}"}
    given: dict[str, Any] = {"concepts": concepts}
    if name == "head_weakening":
        bright = lambda pictures, prompts: [float(np.asarray(each).mean()) for each in pictures]  # noqa: E731
        given |= {"concept": "digit", "measure": bright, "step": 24, "controls": 1}
    return catalogue()[name].function(hw.load("t2i-digits"), ["bright one left", "dim two right"], **given)


ELSEWHERE = {
    **dict.fromkeys(ON_CLIP, on_clip),
    **dict.fromkeys(("space_time", "frame_knockout"), on_video),
    **dict.fromkeys(("head_relevance", "head_weakening"), on_drawings),
}


@pytest.mark.parametrize("name", rows())
def test_every_result_is_drawn(name: str, tmp_path: Path) -> None:
    asked = catalogue()[name]
    given = OTHERS.get(name, "llama")
    made = ELSEWHERE.get(name)
    result = made(name) if made else matrix_calls.call(asked, subject(given))
    drawn = hw.figure(result)
    assert drawn.layout.title.text.replace("<br>", " ") == html.escape(asked.question, quote=False)
    text = words_of(drawn)
    shown = [trace for trace in drawn.data if trace.visible is not False and hasattr(trace, "xaxis")]
    noted = [
        trace for trace in shown if getattr(trace, "mode", "") == "text"
    ]  # says that there is nothing to draw
    for trace in shown:
        for letter in "xy":
            axis = drawn.layout[f"{letter}axis{(trace[f'{letter}axis'] or letter)[1:]}"]
            named = (
                axis.title.text or axis.showticklabels is False
            )  # a panel beside or below carries the name
            assert named or axis.visible is False, f"the {letter} axis of {trace.type} has no title"
    if shown and not noted and not isinstance(result, nx.Graph):
        arrays = result.data_vars.values() if isinstance(result, xr.Dataset) else ()
        units = [
            about["unit"] for about in (result.attrs, *(each.attrs for each in arrays)) if "unit" in about
        ]
        assert any(unit[:12] in text for unit in units), f"{units} are nowhere in the figure"
    if isinstance(result, nx.Graph):
        assert len(drawn.data) == 1 + result.number_of_edges() or noted
    else:
        held, seen = np.unique(numbers_of(result)), np.unique(numbers_drawn(drawn))
        strange = [x for x in seen if not np.isclose(held, x, rtol=1e-6, atol=1e-12).any()]
        assert not strange, f"drawn, and not in the result: {strange[:3]}"
        if isinstance(result, xr.DataArray) and "choose with" not in text:
            if "key_row" in result.coords:  # the remark tells what is no patch, with fewer digits
                patches = (result.key_row >= 0).broadcast_like(result).transpose(*result.dims).values
                held = np.unique(result.values[patches])
            missing = [x for x in held if not np.isclose(seen, x, rtol=1e-6, atol=1e-12).any()]
            assert not missing, f"in the result, and not drawn: {missing[:3]}"
        assert seen.size or noted or any(trace.type == "table" for trace in drawn.data)
    drawn.write_html(tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size < 8_000_000  # plotly.js itself is 4.7 MB
