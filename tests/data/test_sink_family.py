"""The sink family: Headwater's kernels against the training script's dense attention, and the figures that ship.

Mutations seen to fail: the learned value left out, the learned key's logit without its scale, the sigmoid normalised,
the rule lost on a copy of the model.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headwater as hw
from headwater import analyses
from headwater.lens.errors import ModelError
from headwater.lens.models.embedded import FOLDER

pytestmark = pytest.mark.slow

VARIANTS = ("softmax", "softmax1", "sigmoid", "kvbias", "nope", "sigmoid-continued")


@pytest.fixture(scope="module")
def scripts():
    """The modules of data/models/sink-2l, which are scripts and not part of the package."""
    folder, names = str(FOLDER / "sink-2l"), ("language", "measure", "train")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}  # another model's scripts
    sys.path.insert(0, folder)
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def dense_twin(scripts, variant: str):
    train = scripts["train"]
    twin = train.build(train.VARIANTS[variant]).eval()
    weights = load_file(FOLDER / f"sink-2l-{variant}" / "model.safetensors")
    beside = FOLDER / f"sink-2l-{variant}" / "attention.safetensors"
    twin.load_state_dict(weights | (load_file(beside) if beside.is_file() else {}))
    return twin


def test_heavy_rows_cost_what_they_sum_to_above_one(scripts) -> None:
    """Rows that sum to less, and a whole row on one key, cost nothing."""
    train = scripts["train"]
    weights = torch.tensor([[[[1.0, 0.0], [0.2, 0.3]], [[0.5, 0.0], [0.9, 0.6]]]])
    assert train.excess((weights, weights)).item() == pytest.approx(0.25 / 4)
    rows, left = scripts["language"].texts(2, 65, "held"), {}
    for hold in (0.0, 1.0):
        torch.manual_seed(0)
        model = train.build({"normaliser": "sigmoid", "hold": hold})
        optimiser = train.optimiser_of(model)
        for _ in range(8):
            train.learn(model, optimiser, rows, 5e-3, hold)
        with torch.no_grad():
            left[hold] = train.excess(model(rows, use_cache=False, output_attentions=True).attentions).item()
    assert left[1.0] < 0.5 * left[0.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_agree_with_the_dense_attention_it_was_trained_with(scripts, variant: str) -> None:
    rows = scripts["language"].texts(3, 40, "agreement")
    model, twin = hw.load(f"sink-2l-{variant}"), dense_twin(scripts, variant)
    with torch.no_grad():
        expected = twin(rows, use_cache=False).logits
    torch.testing.assert_close(model(rows), expected, atol=1e-4, rtol=1e-5)
    maps = scripts["measure"].maps(twin, rows)
    record = model.record(rows)
    for layer in (0, 1):
        torch.testing.assert_close(record.pattern(layer).double(), maps[layer], atol=2e-5, rtol=1e-4)
    for proxy in (False, True):
        share = scripts["measure"].shares(maps, proxy)[..., 0]
        found = analyses.sink_rate(record, unit_rows=proxy)
        torch.testing.assert_close(
            torch.from_numpy(found.received_share_per_example.values).transpose(0, 1),
            share,
            atol=2e-5,
            rtol=1e-4,
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_figures_that_ship_are_those_of_the_weights(scripts, variant: str) -> None:
    stated = json.loads((FOLDER / f"sink-2l-{variant}" / "metrics.json").read_text())
    rows = scripts["language"].texts(200, 65, "held-out held-out")
    model = hw.load(f"sink-2l-{variant}")
    loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert loss.item() == pytest.approx(stated["loss"], abs=1e-4)
    record = model.record(rows[:, :64], statistics=("received", "visible", "row_mass"))
    plain, proxy = (analyses.sink_rate(record, unit_rows=unit) for unit in (False, True))
    # a head at the threshold may fall to either side of it by rounding
    assert float(plain.sink_rate) == pytest.approx(stated["text"]["sink_rate"], abs=2e-3)
    assert float(proxy.sink_rate) == pytest.approx(stated["text"]["sink_rate_of_shares"], abs=2e-3)
    assert float(plain.received_share.mean()) == pytest.approx(stated["text"]["first_share"], abs=1e-4)
    assert record.provenance.get("attention", "softmax").startswith(
        {"kvbias": "softmax, a learned", "nope": "softmax", "sigmoid-continued": "sigmoid"}.get(
            variant, variant
        )
    )


def test_softmax_makes_a_sink_and_the_others_less(scripts) -> None:
    """What the README says was found."""
    found = {v: json.loads((FOLDER / f"sink-2l-{v}" / "metrics.json").read_text()) for v in VARIANTS}
    rate = {v: found[v]["text"]["sink_rate"] for v in VARIANTS}
    assert rate["softmax"] > 0.15
    assert max(rate["softmax1"], rate["kvbias"]) < 0.8 * rate["softmax"]
    assert rate["nope"] == 0
    # without normalisation there is none at the same work, from scratch and from the weights of softmax
    assert found["sigmoid"]["loss"] < found["softmax"]["loss"]
    assert rate["sigmoid"] == found["sigmoid"]["text"]["sink_rate_of_shares"] == 0
    continued = found["sigmoid-continued"]
    assert continued["loss"] < found["softmax"]["loss"] + 0.1 < found["nope"]["loss"] - 0.3
    assert continued["text"]["sink_rate_of_shares"] < 0.02
    assert all(found[v]["repeated_token"]["sink_rate_of_shares"] < 0.01 for v in VARIANTS)
    page = (FOLDER / "sink-2l" / "README.md").read_text()
    for variant, figures in found.items():
        cell = f"{figures['text']['sink_rate']:.3f} ({figures['text']['sink_rate_of_shares']:.3f})"
        assert f"| {variant} | {figures['loss']:.2f} |" in page
        assert cell in page


def test_the_sink_goes_over_the_kept_steps(scripts) -> None:
    """The kept weights begin with those of softmax; rows of the README are measured again."""
    train, measure = scripts["train"], scripts["measure"]
    folder = FOLDER / "sink-2l-sigmoid-continued"
    steps, page = (
        load_file(folder / "checkpoints.safetensors"),
        (FOLDER / "sink-2l" / "README.md").read_text(),
    )
    begun = load_file(FOLDER / "sink-2l-softmax" / "model.safetensors")
    for name, weights in begun.items():
        assert torch.equal(steps[f"0.{name}"], weights.half())
    model = train.build(train.VARIANTS["sigmoid-continued"]).eval()
    for step in train.MARKS:
        of_step = {n.partition(".")[2]: w.float() for n, w in steps.items() if n.startswith(f"{step}.")}
        model.load_state_dict(of_step)
        found = measure.everything(model, 64, "emergence")
        rate, mass = found["text"]["sink_rate_of_shares"], found["text"]["row_mass"]
        assert f"| {step} | {found['loss']:.2f} | {rate:.3f} | {mass:.2f} |" in page


def test_without_positions_a_first_layer_does_not_know_the_order_of_the_words_before(scripts) -> None:
    rows = scripts["language"].random_tokens(8, 40, "order")
    mixed = rows.clone()
    order = torch.randperm(38, generator=torch.Generator().manual_seed(0))
    mixed[:, 1:39] = rows[:, 1:39][:, order]
    moved, size = {}, {}
    for variant in ("nope", "softmax"):
        model = hw.load(f"sink-2l-{variant}")
        last, other = (model.record(each, keep=("residual",)).residual(1)[:, -1] for each in (rows, mixed))
        moved[variant] = (last - other).norm(dim=-1).max().item()
        size[variant] = last.norm(dim=-1).mean().item()
    assert moved["nope"] < 1e-6 * size["nope"]
    assert moved["softmax"] > size["softmax"]


@pytest.mark.parametrize("variant", ["sigmoid", "kvbias", "sigmoid-continued"])
def test_a_rule_of_its_own_goes_where_the_model_goes(scripts, variant: str, tmp_path: Path) -> None:
    """Copies, a cache, records on disk, and edits on top."""
    rows = scripts["language"].texts(2, 20, "rules")
    model = hw.load(f"sink-2l-{variant}")
    expected = model(rows)
    torch.testing.assert_close(copy.deepcopy(model)(rows), expected)
    record = model.record(rows)
    opened = hw.Record.open(record.save(tmp_path / "r.safetensors"))
    torch.testing.assert_close(opened.pattern(1), record.pattern(1), rtol=0, atol=0)
    longer = model.generate(rows, max_new_tokens=4)
    for step in range(4):
        assert (model(longer[:, : 20 + step])[:, -1].argmax(-1) == longer[:, 20 + step]).all()
    with model.edit(hw.Normaliser("softmax1")):
        changed = model.record(rows)
    assert (changed.statistic("row_mass") <= 1 + 1e-5).all()
    assert not torch.equal(changed.pattern(1), record.pattern(1))


def broken(tmp_path: Path, change) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (FOLDER / "sink-2l-kvbias").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    return folder


def declare(value):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["headwater_attention"] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def short(folder: Path) -> None:
    tensors = load_file(folder / "attention.safetensors")
    save_file({n: t[:2].contiguous() for n, t in tensors.items()}, folder / "attention.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (declare({"normaliser": "sigmoyd"}), "unknown normaliser 'sigmoyd'"),
        (declare({"kv_bias": True, "extra": 1}), "takes normaliser and kv_bias"),
        (declare({"kv_bias": True, "normaliser": "sigmoid"}), "goes with a softmax"),
        (declare("softmax"), "takes normaliser and kv_bias"),
        (lambda folder: (folder / "attention.safetensors").unlink(), r"has no attention\.safetensors"),
        (lambda folder: (folder / "attention.safetensors").write_bytes(b"no"), r"attention\.safetensors"),
        (short, r"bias_key must be finite numbers \[4, 16\]; got \[2, 16\]"),
    ],
)
def test_a_wrong_rule_is_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        hw.load(broken(tmp_path, change))
    assert "\n" not in str(error.value)
