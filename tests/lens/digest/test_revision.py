"""The revision: it changes with everything that decides a number, and with nothing else."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import tiny_models
import torch
import transformers
from torch import nn

import headwater as hw
from headwater.kernels.rules.normaliser import Normaliser
from headwater.lens.attention.own_rule import ATTRIBUTE, OwnRule
from headwater.lens.errors import ExperimentError
from headwater.lens.loading import zoo


def of(hf):
    return hw.load(hf).revision


@pytest.fixture
def hf():
    return tiny_models.tiny("llama")


def middle_of_a_matrix(hf):
    hf.model.layers[1].self_attn.q_proj.weight.data[5, 7] += 1


def most_of_a_matrix(hf):
    weight = hf.model.layers[0].mlp.up_proj.weight.data.view(-1)
    weight[64:-64] = 0


def rotation(hf):
    hf.model.rotary_emb.inv_freq.mul_(0.9)


def scale(hf):
    hf.model.layers[0].self_attn.scaling *= 2


def norm(hf):
    hf.model.norm.variance_epsilon = 1e-2


def precision(hf):
    hf.to(torch.bfloat16)


def activation(hf):
    hf.model.layers[1].mlp.act_fn = nn.ReLU()


def setting(hf):
    hf.config.rms_norm_eps = 1e-2


CHANGES = [middle_of_a_matrix, most_of_a_matrix, rotation, scale, norm, precision, activation, setting]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_decides_a_number_changes_it(hf, change):
    before = of(copy.deepcopy(hf))
    change(hf)
    assert of(hf) != before


def test_a_rule_that_a_folder_declares_changes_it(hf):
    model = hw.load(hf)
    before = model.revision
    setattr(hf.model.layers[0].self_attn, ATTRIBUTE, OwnRule(Normaliser("sigmoid")))
    assert model.revision != before


def test_names_and_labels_do_not_change_it(hf):
    before = of(copy.deepcopy(hf))
    hf.config._name_or_path = "/somewhere/else"
    hf.config.id2label = {0: "good", 1: "bad"}
    hf.config.use_cache = not hf.config.use_cache
    assert of(hf) == before


def test_from_a_folder_and_from_memory_it_is_the_same(hf, tmp_path):
    hf.save_pretrained(tmp_path)
    model = hw.load(tmp_path)
    before = model.revision
    model.record(torch.arange(3, 12)[None])
    assert before == model.revision == of(hf) == copy.deepcopy(model).revision
    assert pickle.loads(pickle.dumps(model.weights_digest)).now() == before


def test_weights_that_change_while_the_model_is_open_change_it(hf):
    model = hw.load(hf)
    before = model.revision
    with torch.no_grad():
        hf.lm_head.weight[3, 4] += 1
    after = model.revision
    assert after != before
    assert model.record(torch.arange(3, 12)[None]).provenance["revision"] == after
    weight = hf.lm_head.weight.detach().clone()
    hf.lm_head.weight = nn.Parameter(weight + 1)
    assert model.revision not in (before, after)
    hf.lm_head.weight = nn.Parameter(weight)
    assert model.revision == after


def hook(hf):
    hf.model.layers[0].mlp.register_forward_hook(doubled)


def doubled(module, args, output):
    return 2 * output


def own_forward(hf):
    hf.model.layers[0].mlp.forward = lambda x: x


def beside_torch(hf):
    hf.model.layers[0].mlp.up_proj.weight.data.mul_(2)


@pytest.mark.parametrize("change", [*CHANGES, hook, own_forward, beside_torch], ids=lambda c: c.__name__)
def test_whatever_changes_while_the_model_is_open_changes_it(hf, change):
    model = hw.load(hf)
    before = model.revision
    change(hf)
    assert model.revision != before


def test_what_is_taken_back_is_as_before(hf):
    model = hw.load(hf)
    before = model.revision
    handle = hf.model.layers[0].mlp.register_forward_hook(doubled)
    attention = hf.model.layers[1].self_attn
    attention.scaling, kept = 2, attention.scaling
    attention.added = True
    assert model.revision != before
    handle.remove()
    attention.scaling = kept
    assert model.revision != before
    attention.added = 1  # equal to True, and written otherwise
    assert model.revision != before
    del attention.added
    assert model.revision == before


class Other(nn.Linear):
    pass


def test_another_class_and_a_list_that_grows_change_it(hf):
    model = hw.load(hf)
    seen = [model.revision]
    projection = hf.model.layers[0].self_attn.q_proj
    projection.__class__ = Other
    seen.append(model.revision)
    projection.windows = [4]
    seen.append(model.revision)
    projection.windows.append(5)
    seen.append(model.revision)
    assert len(set(seen)) == 4


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_of_the_length_of_a_text_do_not_change_it(kind):
    config = tiny_models.tiny("llama").config
    half = config.head_dim // 2
    config.rope_parameters = {
        "rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 8,
        "long_factor": [2.0] * half, "short_factor": [1.0] * half,
    }  # fmt: skip
    config.max_position_embeddings = 8
    hf = transformers.LlamaForCausalLM(config).eval()
    model = hw.load(hf)
    before = model.revision
    with torch.no_grad():
        hf(torch.arange(3, 23)[None])
    assert model.revision == before


def test_an_experiment_does_not_go_on_with_another_model(tmp_path, hf):
    folder = tmp_path / "small"
    hf.save_pretrained(folder)
    experiment = hw.Experiment(model="small", prompts=[{"tokens": [5, 7, 9, 5]}] * 2, measures=["loss"])
    asked = experiment.model_copy(update={"revision": experiment.load(tmp_path).revision})
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExperimentError, match=r"is of weights model-sha256:.* leave out the revision"):
        asked.run(folder=tmp_path)


def test_a_processor_has_a_digest_of_its_settings() -> None:
    hf = zoo.build("vit_classifier")
    plain, small = (
        hw.load(hf, processor=transformers.ViTImageProcessorPil(size={"height": n, "width": n}))
        for n in (12, 10)
    )
    assert plain.processor_revision.startswith("sha256:")
    assert plain.processor_revision != small.processor_revision
    assert hw.load("tasks-4l").processor_revision == ""
