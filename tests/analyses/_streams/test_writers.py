"""The stream of hybrid models as a sum, with what mixers wrote as terms, held to hooks on the modules by hand."""

from __future__ import annotations

import pytest
import torch
from hybrid_models import hybrid

import headwater as hw
from headwater import analyses
from headwater.analyses._prompts.examples import Batch
from headwater.analyses._streams.writers import Writers
from headwater.lens.errors import AnalysisError

IDS = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(3))
SUMS = (
    "jamba",
    "bamba",
    "granite",
    "falcon_h1",
    "recurrent_gemma",
    "olmo_hybrid",
    "qwen3_next",
    "lfm2",
    "nemotron_h",
)


def by_hand(model, names):
    """The outputs of modules, and the stream entering and leaving each block, from plain forward hooks."""
    found, hooks = {}, []
    for name in names:

        def keep(module, args, kwargs, output, name=name):
            given = args[0] if args else kwargs["hidden_states"]
            output = output if isinstance(output, torch.Tensor) else output[0]
            found[name] = given.detach().double(), output.detach().double()

        hooks.append(model.hf.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model.hf(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", SUMS)
def test_terms_before_every_layer_add_up_to_the_stream(name):
    model = hw.load(hybrid(name))
    run = Writers.of(model, Batch(IDS, [0]))
    stream = by_hand(model, [f"model.layers.{n}" for n in range(4)])
    for layer in range(4):
        total = sum(vectors for _, vectors in run.parts(layer))
        torch.testing.assert_close(total, stream[f"model.layers.{layer}"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        sum(v for _, v in run.parts()), stream["model.layers.3"][1], atol=1e-5, rtol=1e-5
    )
    mixers = by_hand(model, [mixer.path for mixer in model.mixers])
    terms = dict(run.parts())
    assert {name for name in terms if name.startswith("mixer.")} == {f"mixer.{m.layer}" for m in model.mixers}
    for mixer in model.mixers:
        torch.testing.assert_close(terms[f"mixer.{mixer.layer}"], mixers[mixer.path][1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["jamba", "falcon_h1"])
def test_direct_logit_attribution_sums_to_the_logits_with_the_mixers(name):
    model = hw.load(hybrid(name))
    logits = model(IDS)[0, -1].double()
    for norm in ("frozen", "path_from_embedding"):
        found = analyses.direct_logit_attribution(model, IDS, answer="#11", wrong="#23", norm=norm)
        assert abs(float(found.sum()) - float(logits[11] - logits[23])) < 1e-5
    mixer = model.mixers[0]
    wrote = by_hand(model, [mixer.path, "model.layers.3"])
    final = getattr(model.hf.model, "final_layernorm", None)
    final = model.hf.model.final_layernorm.weight.double()
    last = wrote["model.layers.3"][1][0, -1]
    scale = (last.square().mean() + model.hf.config.rms_norm_eps).sqrt()
    head = model.hf.lm_head.weight.double()
    expected = (final * wrote[mixer.path][1][0, -1] / scale) @ (head[11] - head[23])
    found = analyses.direct_logit_attribution(model, IDS, answer="#11", wrong="#23")
    torch.testing.assert_close(
        float(found.sel(component=f"mixer.{mixer.layer}")[0]), float(expected.detach()), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["zamba2", "minimax"])
def test_a_stream_that_is_no_sum_is_refused_by_its_block(name):
    model = hw.load(hybrid(name))
    with pytest.raises(
        AnalysisError, match=r"is no sum of what its parts add: block \d gives something else"
    ):
        Writers.of(model, Batch(IDS, [0]))


def test_heads_behind_an_output_gate_by_source_add_up():
    model = hw.load(hybrid("qwen3_5"))
    heads, sources = (
        analyses.direct_logit_attribution(model, IDS, answer="#11", wrong="#23", unit=unit)
        for unit in ("head", "source")
    )
    assert abs(sources.sum("key") - heads).max() < 1e-5
    logits = model(IDS)[0, -1].double()
    parts = analyses.direct_logit_attribution(model, IDS, answer="#11", wrong="#23")
    assert abs(float(parts.sum()) - float(logits[11] - logits[23])) < 1e-5
    head = analyses.ov_decomposition(model, IDS, head="1.2", answer="#11")
    total = analyses.direct_logit_attribution(model, IDS, answer="#11", unit="head").sel(layer=1, head=2)
    assert float(head.sum()) == pytest.approx(float(total[0]), abs=1e-4)
