"""A sweep file is data: its units follow from it, and what is wrong is said in one line before anything runs."""

import itertools
import json

import pytest
import sweep_engines

import headwater as hw
from headwater.lens.errors import HeadwaterError

PAIR = {"clean": "Mary gave John a drink", "corrupt": "John gave Mary a drink"}


def test_units_are_the_product_of_what_is_asked():
    sweep = sweep_engines.asked(
        layers=[[0, 1], [2, 3], [1]], edits=sweep_engines.OFF, pairs=[PAIR], prompts=["a", "b"],
        analyses=[{"analysis": "sink_rate", "each": {"threshold": [0.3, 0.5]}}, {"analysis": "patch"}],
    )  # fmt: skip
    ranges, names = [[0, 1], [2, 3], [1]], ["none", "off"]
    expected = [
        ("sink_rate", {"threshold": above}, "prompt", at, layers, edits)
        for above, edits, layers, at in itertools.product([0.3, 0.5], names, ranges, [0, 1])
    ] + [("patch", {}, "pair", 0, layers, edits) for edits, layers in itertools.product(names, ranges)]
    units = [sweep.unit(number) for number in range(len(sweep))]
    assert [(u.analysis, u.settings, u.kind, u.at, u.layers, u.edits) for u in units] == expected
    assert [unit.number for unit in units] == list(range(30))
    assert sweep.units_of(None).firsts == [0, 12, 24, 30]


def test_seeds_are_for_analyses_that_draw():
    sweep = sweep_engines.asked(prompts=[], seeds=[4, 9], analyses=[{"analysis": "head_roles"}])
    assert [(sweep.unit(n).seed, sweep.unit(n).kind) for n in range(len(sweep))] == [(4, ""), (9, "")]


def test_a_key_differs_with_everything_that_decides_the_numbers():
    sweep = sweep_engines.asked(layers=[[0], [1]], edits=sweep_engines.OFF)
    keys = {
        sweep.unit(n).key("run", f"text {sweep.unit(n).at}", sweep.unit(n).edits) for n in range(len(sweep))
    }
    assert len(keys) == len(sweep) == 16
    unit = sweep.unit(0)
    assert (
        len(
            {
                unit.key("a", "b", "c"),
                unit.key("x", "b", "c"),
                unit.key("a", "x", "c"),
                unit.key("a", "b", "x"),
            }
        )
        == 4
    )
    assert unit.key("a", "b", "c") == sweep_engines.asked(layers=[[0]]).unit(0).key("a", "b", "c")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"promts": []}, "promts is no key of the sweep: did you mean 'prompts'"),
        ({"prompts": [{"txt": "a"}]}, "prompts.0.txt is no key of the sweep: did you mean 'text'"),
        ({"prompts": []}, "rollout reads prompts, and the sweep has none"),
        ({"pairs": [PAIR]}, "no analysis of the sweep reads pairs"),
        ({"analyses": [{"analysis": "rolout"}]}, "did you mean 'rollout'"),
        ({"analyses": [{"analysis": "rollout", "settings": {"residul": 1}}]}, "no setting 'residul'"),
        ({"analyses": [{"analysis": "rollout", "settings": {"residual": 7.0}}]}, "residual=7.0"),
        ({"analyses": [{"analysis": "rollout", "each": {"residual": [0.5, "x"]}}]}, "residual='x'"),
        ({"analyses": [{"analysis": "raw_attention", "settings": {"layers": [0]}, "each": {"layers": [[1]]}}]}, "once"),
        ({"analyses": [{"analysis": "redistribution_study", "settings": {"resume": "/etc/x"}}]}, "names a file"),
        ({"analyses": [{"analysis": "circuit_overlap"}]}, "runs no model"),
        ({"analyses": [{"analysis": "word_ranks"}]}, "needs the setting words"),
        ({"analyses": [{"analysis": "head_importance"}], "layers": [[0]]}, "reads every layer"),
        ({"layers": [[0], [0]]}, "holds a value twice"),
        ({"layers": [[-1]]}, "layers.0.0"),
        ({"seeds": [0, 1]}, "draws nothing"),
        ({"analyses": [{"analysis": "text_heatmap", "settings": {"texts": "/etc/passwd"}}]}, "give a list of texts"),
        ({"analyses": [{"analysis": "segmentation", "settings": {"masks": ["/etc/passwd"]}}]}, "leave it out"),
        ({"edits": {"a/b": []}}, "edits.a/b"),
        ({"edits": {"a": [{"edit": "Knockot"}]}}, "did you mean 'Knockout'"),
        ({"threads": 0}, "threads"),
        ({"device_map": "auto"}, "one device"),
        ({"tensor_parallel": 2}, "cut over devices"),
        ({"tp_plan": "auto"}, "cut over devices"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)  # fmt: skip
def test_bad_sweeps_are_one_line(change, words, tmp_path):
    base = {"model": "tasks-4l", "prompts": ["a"], "analyses": [{"analysis": "rollout"}]}
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(base | change))
    with pytest.raises(HeadwaterError) as caught:
        hw.Sweep.open(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_than_memory_holds_is_refused_before_it_is_listed(monkeypatch):
    """A file of a few kilobytes asks for more than 2^63 units."""
    monkeypatch.setattr(
        "headwater.analyses._sweeps.asked.Asked.combinations", lambda self: pytest.fail("listed")
    )
    thousand = {"length": list(range(1, 1001)), "min_queries": list(range(1, 1001)), "alpha": [5.0, 6.0]}
    many = {"analysis": "find_sinks", "each": thousand}
    with pytest.raises(HeadwaterError, match="each gives 2,000,000 combinations of settings"):
        sweep_engines.asked(analyses=[many])
    numbers = [n / 10_000 for n in range(10_000)]
    each = {"threshold": numbers, "alpha": numbers, "length": list(range(1, 10_001))}
    each["min_queries"] = each["length"]
    with pytest.raises(HeadwaterError, match="each gives 10,000,000,000,000,000 combinations"):
        sweep_engines.asked(analyses=[{"analysis": "find_sinks", "each": each}])
    seeds = list(range(100_000))
    asked = {
        "analysis": "agreement",
        "each": {"draws": list(range(1, 1001)), "batch_size": list(range(1, 1001))},
    }
    with pytest.raises(HeadwaterError, match="the sweep has 400,000,000,000 units"):
        sweep_engines.asked(seeds=seeds, analyses=[asked])


@pytest.mark.parametrize("text", ["", "[]", '{"model": 1, "model": 2}', "[" * 100_000, '{"seeds": [NaN]}'])
def test_what_is_no_sweep_is_one_line(text):
    with pytest.raises(HeadwaterError) as caught:
        hw.Sweep.from_json(text)
    assert "\n" not in str(caught.value)
