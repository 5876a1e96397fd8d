"""Path patching of hybrid models held to hooks by hand: mixers are frozen and are senders, in every kind of block."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hybrid_models import built, hybrid

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

CLEAN = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(3))
CORRUPT = CLEAN.clone()
CORRUPT[0, 4] = 17


@contextlib.contextmanager
def giving(hf, outputs):
    """Modules give these outputs in place of their own; a module named with "<" is given this as its input."""
    hooks = []
    for path, value in outputs.items():
        module = hf.get_submodule(path.removeprefix("<"))
        if path.startswith("<"):
            hooks.append(module.register_forward_pre_hook(lambda m, args, value=value: (value, *args[1:])))
        else:
            hooks.append(
                module.register_forward_hook(
                    lambda m, args, out, value=value: (value, *out[1:]) if isinstance(out, tuple) else value
                )
            )
    yield
    for hook in hooks:
        hook.remove()


def outputs(hf, ids, paths):
    found, hooks = {}, []
    for path in paths:

        def keep(module, args, out, path=path):
            found[path] = out[0] if isinstance(out, tuple) else out

        hooks.append(hf.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        found["logits"] = hf(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


def _changed(model, steps, clean, corrupt):
    frozen = {path: clean[path] for path in steps.values()} | {steps["mixer", 3]: corrupt[steps["mixer", 3]]}
    with giving(model.hf, frozen), torch.no_grad():
        return model.hf(input_ids=CLEAN, use_cache=False).logits


@pytest.mark.parametrize("name", ["jamba", "lfm2"])
def test_direct_paths_of_mixers_mlps_and_the_embedding(name):
    model = hw.load(hybrid(name))
    hf = model.hf
    steps = {(s.kind, b.layer): s.path for b in model.stack for s in b.steps}
    embedding = "model.embed_tokens"
    clean, corrupt = (outputs(hf, ids, [*steps.values(), embedding]) for ids in (CLEAN, CORRUPT))

    def difference(logits):
        return float(logits[0, -1, 11] - logits[0, -1, 23])

    low, high = difference(clean["logits"]), difference(corrupt["logits"])
    found = analyses.path_patch(model, CLEAN, CORRUPT, answer="#11", wrong="#23", mlps="frozen")
    senders = {"embed": embedding, "mixer.0": steps["mixer", 0], "mlp.0": steps["mlp", 0]}
    senders |= {"mixer.2": steps["mixer", 2], "mlp.3": steps["mlp", 3]}
    for sender, path in senders.items():
        frozen = {other: clean[other] for other in steps.values()} | {path: corrupt[path]}
        with giving(hf, frozen), torch.no_grad():
            changed = difference(hf(input_ids=CLEAN, use_cache=False).logits)
        expected = (changed - low) / (high - low)
        assert float(found.sel(sender=sender)[0]) == pytest.approx(expected, abs=1e-4), sender


def test_blocks_behind_the_last_attention_are_senders_too():
    model = hw.load(built("Lfm2ForCausalLM", layer_types=["full_attention", "conv"] * 2))
    found = analyses.path_patch(model, CLEAN, CORRUPT, answer="#11", wrong="#23", mlps="frozen")
    names = found.sender.values.tolist()
    assert [n for n in names if n.startswith("m")] == [
        "mlp.0",
        "mixer.1",
        "mlp.1",
        "mlp.2",
        "mixer.3",
        "mlp.3",
    ]
    steps = {(s.kind, b.layer): s.path for b in model.stack for s in b.steps}
    clean, corrupt = (outputs(model.hf, ids, steps.values()) for ids in (CLEAN, CORRUPT))
    low, high, changed = (
        logits[0, -1, 11] - logits[0, -1, 23]
        for logits in (clean["logits"], corrupt["logits"], _changed(model, steps, clean, corrupt))
    )
    assert float(found.sel(sender="mixer.3")[0]) == pytest.approx(
        float((changed - low) / (high - low)), abs=1e-4
    )


def test_what_is_written_by_unknown_parts_is_refused():
    model = hw.load(hybrid("zamba2"))
    with pytest.raises(AnalysisError, match="add to the stream is not known"):
        analyses.path_patch(model, CLEAN, CORRUPT, answer="#11", wrong="#23", mlps="frozen")
