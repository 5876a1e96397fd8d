"""`headwater analyze`: every analysis of the catalogue runs, with its settings, and says what the library says."""

import json
import re
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

import headwater as hw
from headwater import analyses
from headwater.analyses._catalogue.about import room_questions
from headwater.analyses._catalogue.catalogue import catalogue
from headwater.analyses.circuits._graph_files import write_circuit

ROOT = Path(__file__).parents[2]
PROMPT = "the cat sat on a mat ."
OF_PICTURES = {file.stem for file in (ROOT / "analyses" / "vision").glob("[!_]*.py")}
# of images, of models with gated attention, and what takes further inputs or a larger vocabulary
OF_OTHERS = OF_PICTURES | {"patch_distance", "output_gates", "word_ranks", "retrieval_heads", "kv_needles"}
OWN = {
    "align_subspace": [*[PROMPT, "the mat sat on a cat ."] * 4, "--set", "answer=cat"],
    "kv_curve": [PROMPT, "--set", "window=1", "--set", "sinks=1", "--set", "kept=0.5"],
    "kv_scores": [PROMPT, "--set", "window=2", "--set", "sinks=1"],
    "contrastive_qk": ["the cat sat on the cat ."],
}


@pytest.mark.parametrize("name", [name for name in catalogue() if name not in OF_OTHERS])
@pytest.mark.parametrize("form", ["text", pytest.param("json", marks=pytest.mark.slow)])
def test_every_analysis_runs_from_the_command_line(headwater, tiny, tmp_path, name: str, form: str) -> None:
    circuit = nx.DiGraph()
    circuit.add_node("0.1", kind="head", layer=0, head=1)
    file = str(write_circuit(circuit, tmp_path / "circuit.json"))
    prompts = {"model": [], "model+pairs": [PROMPT, "the mat sat on a cat ."], "circuits": [file, file]}.get(
        catalogue()[name].inputs, [PROMPT, "the cat sat on"]
    )
    prompts = OWN.get(name, prompts)
    run = headwater("analyze", name, *prompts, "-m", tiny, *(["--json"] if form == "json" else []))
    assert run.exit_code == 0, run.stderr
    if form == "json":
        assert json.loads(run.stdout)["attrs"]["question"] == catalogue()[name].question
    else:
        assert run.stdout.startswith(catalogue()[name].question)
        assert f"not for: {catalogue()[name].not_for}" in run.stdout


@pytest.mark.parametrize("name", sorted(OF_PICTURES & set(catalogue())))
def test_analyses_of_pictures_run_or_say_in_a_line_what_they_miss(headwater, tiny, name: str) -> None:
    run = headwater("analyze", name, PROMPT, "the cat sat on", "-m", tiny)
    assert run.exit_code == 0 or re.fullmatch(r"headwater: [^\n]+\n?", run.stderr), run.stderr


def test_settings_reach_the_analysis(headwater, tiny) -> None:
    run = headwater(
        "analyze", "rollout", PROMPT, "-m", tiny, "--set", "queries=1,-1", "--set", "residual=0.25", "--json"
    )
    expected = analyses.rollout(hw.load(tiny).record(PROMPT), queries=[1, -1], residual=0.25)
    np.testing.assert_allclose(json.loads(run.stdout)["data"], expected.values, atol=1e-6)


@pytest.mark.parametrize("answer", ["Mary", " Mary"])
def test_a_word_keeps_the_space_in_front_of_it(headwater, answer: str) -> None:
    prompt = "When Mary and John went to the store , John gave a drink to"
    run = headwater("analyze", "logit_lens", prompt, "--set", f"answer={answer}", "--json")
    assert json.loads(run.stdout)["attrs"]["answer"] == answer


def test_the_table_shows_the_numbers_and_their_tokens(headwater, tiny) -> None:
    expected = analyses.rollout(hw.load(tiny).record(PROMPT)).values[0, 0]
    lines = headwater("analyze", "rollout", PROMPT, "-m", tiny).stdout.splitlines()
    for position, word in enumerate(PROMPT.split()):
        assert [str(position), word, f"{expected[position]:.4f}"] in [line.split() for line in lines]


def test_a_saved_record_takes_the_place_of_prompts(headwater, tiny, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    headwater("record", PROMPT, "-m", tiny, "--out", file)
    saved = headwater("analyze", "sink_rate", "--record", file, "--json")
    fresh = headwater("analyze", "sink_rate", PROMPT, "-m", tiny, "--json")
    first, second = json.loads(saved.stdout)["data_vars"], json.loads(fresh.stdout)["data_vars"]
    assert first["sink_rate"]["data"] == second["sink_rate"]["data"]


def test_the_figure_is_one_page_without_network(headwater, tiny, tmp_path: Path) -> None:
    file = tmp_path / "rollout.html"
    assert headwater("analyze", "rollout", PROMPT, "-m", tiny, "--html", file).exit_code == 0
    page = file.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert re.search(r"<(script|link)\b[^>]*\b(src|href)=", page) is None


def test_the_list_names_every_analysis_and_about_every_setting(headwater) -> None:
    listed = headwater("analyze").stdout
    parts = [part.splitlines() for part in listed.split("\n\n")[:-1]]
    assert {question: [line.split()[0] for line in lines] for question, *lines in parts} == {
        question: [name for name, entry in catalogue().items() if entry.room == room]
        for room, question in room_questions().items()
    }
    for name, entry in catalogue().items():
        assert entry.question in listed
        told = headwater("analyze", name, "--about").stdout
        assert entry.paper in told
        for setting in entry.settings:
            assert setting.name in told
    assert [entry["name"] for entry in json.loads(headwater("analyze", "--json").stdout)] == list(catalogue())
