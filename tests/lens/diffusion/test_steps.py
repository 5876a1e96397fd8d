"""Sampling runs (`model.py`, `watch.py`, `words.py`): steps and branches, edits against a processor by hand.

Seen to fail with branches exchanged, with steps that were not counted, and with words in the wrong row.
"""

import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_diffusers

import headwater as hw
from headwater.lens.diffusion.model import DiffusionModel

STEPS = 3
OPTIONS = {"num_inference_steps": STEPS, "output_type": "latent", "height": 16, "width": 16}
PATH = "down_blocks.1.attentions.0.transformer_blocks.0"


def noise():
    return torch.Generator().manual_seed(0)


def drawn(pipeline, prompt="a red cat", **more):
    return pipeline(prompt, generator=noise(), **OPTIONS, **more).images


@pytest.fixture(scope="module")
def pipeline():
    return tiny_diffusers.pipeline()


@pytest.fixture(scope="module")
def model(pipeline):
    return hw.load(pipeline)


class ByHand:
    """A processor of diffusers in plain torch: softmax in float64, then a change of the weights of some rows."""

    def __init__(self, change=None, steps=(), rows=(), out=None):
        self.change, self.steps, self.rows, self.out = change, steps, rows, out
        self.seen = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            each.double().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for each in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        self.seen.append(weights.float())
        if len(self.seen) - 1 in self.steps and self.change is not None:
            weights = weights.clone()
            weights[list(self.rows)] = self.change(weights[list(self.rows)])
        z = weights @ v
        return attn.to_out[0](z.transpose(1, 2).flatten(2).to(hidden_states.dtype))


@pytest.fixture
def by_hand(pipeline):
    """Puts a processor on one attention module and takes it off again."""
    taken = []

    def put(path, processor):
        module = pipeline.unet.get_submodule(path)
        taken.append((module, module.processor))
        module.set_processor(processor)
        return processor

    yield put
    for module, processor in taken:
        module.set_processor(processor)


def layer_of(model, part, path):
    return next(layer for site, layer in model.parts[part].modules.items() if site.key.path == path)


def without_key_2(weights):
    weights = weights.clone()
    weights[..., 2] = 0
    return weights / weights.sum(-1, keepdim=True)


def without_head_1(weights):
    return weights * torch.tensor([1.0, 0.0])[:, None, None]


def twice_key_2(weights):
    return weights * torch.tensor([1.0, 1.0, 2.0] + [1.0] * 6)


def identity(weights):
    return torch.eye(weights.shape[-1], dtype=weights.dtype).expand_as(weights)


EDITS = {
    "knockout": ("attn2", "cross:4x4", lambda n: hw.Knockout("all", [2], layers=[n]), without_key_2),
    "head": ("attn2", "cross:4x4", lambda n: hw.ScaleHeads({f"{n}.1": 0.0}), without_head_1),
    "word": ("attn2", "cross:4x4", lambda n: hw.ScaleWeights([2], 2.0, layers=[n]), twice_key_2),
    "identity": ("attn1", "self:4x4", lambda n: hw.TowardIdentity(1.0, layers=[n]), identity),
}


@pytest.mark.parametrize("which", EDITS)
@pytest.mark.parametrize(("branch", "rows"), [("conditional", [1]), ("unconditional", [0]), ("all", [0, 1])])
def test_edits_at_steps_and_branches_are_a_processor_by_hand(pipeline, model, by_hand, which, branch, rows):
    name, part, edit, change = EDITS[which]
    path = f"{PATH}.{name}"
    made = edit(layer_of(model, part, path))
    plain = drawn(pipeline)
    with model.part(part).edit(hw.AtSteps(made, steps=slice(1, 3), branch=branch)):
        found = drawn(pipeline)
    assert torch.equal(drawn(pipeline), plain)
    by_hand(path, ByHand(change, (1, 2), rows))
    expected = drawn(pipeline)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-4


def test_steps_are_recorded_with_branches_and_words(pipeline, model, by_hand):
    plain = drawn(pipeline)
    path = f"{PATH}.attn2"
    layer = layer_of(model, "cross:4x4", path)
    hand = by_hand(path, ByHand())
    drawn(pipeline)
    pipeline.unet.get_submodule(path).set_processor(
        type(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor)()
    )
    out, steps = model.generate("a red cat", record=True, maps=[1], generator=noise(), **OPTIONS)
    assert torch.equal(out.images, plain)
    assert steps.timesteps == [float(t) for t in pipeline.scheduler.timesteps]
    entropy = steps.statistic("entropy", "cross:4x4")
    assert dict(entropy.sizes) == {"step": STEPS, "branch": 2, "batch": 1, "layer": 4, "head": 2, "query": 16}
    weights = torch.stack(hand.seen)
    expected = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(torch.tensor(entropy.sel(layer=layer).values)[:, :, 0], expected)
    middle = steps.record(1).part("cross:4x4")
    torch.testing.assert_close(middle.map(layer).dense(), weights[1])
    assert not steps.record(0).maps
    empty, prompt = middle.keys.strings
    assert prompt[1:4] == ["a", "red", "cat"]
    assert set(empty[1:]) == {"<|endoftext|>"}
    received = steps.statistic("received", "cross:4x4")
    assert received.sel(branch="conditional").coords["token"].values[0, 3] == "cat"
    assert received.sel(branch="unconditional").coords["token"].values[0, 3] == "<|endoftext|>"


def test_a_run_without_guidance_has_one_branch(pipeline, model):
    _, steps = model.generate("a dog", record=True, guidance_scale=1.0, generator=noise(), **OPTIONS)
    assert steps.branches == ("conditional",)
    edit = hw.AtSteps(hw.ScaleHeads({"0.0": 0.0}), branch="unconditional")
    with model.edit(edit), pytest.raises(hw.HeadwaterError, match="no branch 'unconditional'"):
        drawn(pipeline, guidance_scale=1.0)
    assert drawn(pipeline).isfinite().all()


def test_steps_are_saved_and_opened_again(model, tmp_path):
    _, steps = model.generate(
        "a cat", record=True, maps=[0], statistics=("entropy", "received"), generator=noise(), **OPTIONS
    )
    steps.save(tmp_path / "run")
    again = type(steps).open(tmp_path / "run")
    assert (again.timesteps, again.branches, len(again)) == (steps.timesteps, steps.branches, STEPS)
    for name in ("entropy", "received"):
        for part in model.parts:
            old, new = (each.statistic(name, part) for each in (steps, again))
            assert old.identical(new)
    assert torch.equal(again.record(0).map(0).dense(), steps.record(0).map(0).dense())
    with pytest.raises(hw.HeadwaterError, match="not empty"):
        steps.save(tmp_path / "run")
    with pytest.raises(hw.HeadwaterError, match="holds no steps"):
        type(steps).open(tmp_path)
    with pytest.raises(hw.HeadwaterError, match="no step 7"):
        steps.record(7)


def test_a_loop_of_the_user_names_its_branches():
    unet = tiny_diffusers.unet()
    model = hw.load(unet)
    x, words = torch.randn(2, 4, 8, 8), torch.randn(4, 5, 16)

    @torch.no_grad()
    def loop():
        found = x
        for time in (900, 500):
            found = found - unet(torch.cat([found] * 2), time, words).sample.chunk(2)[1]
        return found

    plain, branches = loop(), ("unconditional", "conditional")
    assert isinstance(model, DiffusionModel)
    with model.part("self:8x8").record_steps(branches) as steps:
        assert torch.equal(loop(), plain)
    assert dict(steps.statistic("entropy").sizes) == {
        "step": 2, "branch": 2, "batch": 2, "layer": 3, "head": 2, "query": 64,
    }  # fmt: skip
    assert steps.timesteps == [900, 500]
    edit = hw.AtSteps(hw.ScaleHeads({"0.0": 0.0}), steps=[0], branch="unconditional")
    with model.sampling(branches), model.edit(edit):
        assert torch.equal(loop(), plain)  # what is not guided by that half is as before
    with model.sampling(branches), model.edit(hw.AtSteps(edit.of, steps=[1], branch="conditional")):
        assert not torch.equal(loop(), plain)
    with model.sampling(("a", "b", "c")), pytest.raises(hw.HeadwaterError, match="no equal shares"):
        loop()


HALVES = ("unconditional", "conditional")


@pytest.mark.parametrize(
    ("kind", "branches", "tokens"),
    [("sd3", HALVES, 22), ("flux", HALVES[::-1], 22), ("dit", HALVES[::-1], 16)],
)
def test_other_pipelines_keep_their_output_and_tell_their_branches(kind, branches, tokens):
    pipeline, options = tiny_diffusers.joint_pipeline(kind)
    plain = torch.as_tensor(pipeline(generator=noise(), **options).images)
    model = hw.load(pipeline)
    out, steps = model.generate(record=True, generator=noise(), **options)
    assert torch.equal(torch.as_tensor(out.images), plain)
    assert steps.branches == branches
    assert dict(steps.statistic("entropy").sizes) == {
        "step": 2, "branch": 2, "batch": 1, "layer": model.n_layers, "head": 2, "query": tokens,
    }  # fmt: skip
    with model.edit(hw.AtSteps(hw.ScaleHeads({"0.0": 0.0}), steps=1, branch="unconditional")):
        _, edited = model.generate(record=True, maps="all", generator=noise(), **options)
    told = [(now.step, now.branches) for now, _ in edited.calls]
    assert told == (
        [(n, (b,)) for n in range(2) for b in branches] if kind == "flux" else [(0, branches), (1, branches)]
    )
    new, old = (each.statistic("entropy").sel(layer=1) for each in (edited, steps))
    assert new.sel(step=0).equals(old.sel(step=0))
    assert new.sel(step=1, branch="conditional").equals(old.sel(step=1, branch="conditional"))
    assert not new.sel(step=1, branch="unconditional").equals(old.sel(step=1, branch="unconditional"))


class OneByOne:
    """The calls of a pipeline that runs its branches one by one."""

    components = {}  # noqa: RUF012
    scheduler = SimpleNamespace(timesteps=[900, 500], order=1)

    def __call__(self, denoiser):
        with denoiser.cache_context("cond"):
            pass
        with denoiser.cache_context("uncond"):
            pass


def test_branches_that_run_one_by_one_are_one_step():
    unet = tiny_diffusers.unet()
    model = hw.load(unet)
    assert isinstance(model, DiffusionModel)
    model.pipeline = OneByOne()
    with model.record_steps() as steps, torch.no_grad():
        for time in (900, 500):
            for seed in (0, 1):
                torch.manual_seed(seed)
                unet(torch.randn(1, 4, 8, 8), time, torch.randn(1, 5, 16))
    assert (len(steps), steps.branches, len(steps.calls)) == (2, ("conditional", "unconditional"), 4)
    assert steps.statistic("entropy").sizes["branch"] == 2


def test_halves_of_classes_are_told_by_the_number_that_means_none():
    dit = tiny_diffusers.dit()
    model = hw.load(dit)
    assert isinstance(model, DiffusionModel)
    model.pipeline = SimpleNamespace(components={}, scheduler=SimpleNamespace(timesteps=[9], order=1))
    with model.record_steps() as steps, torch.no_grad():
        dit(torch.randn(2, 4, 8, 8), torch.tensor([9, 9]), torch.tensor([3, 1000]))
    assert steps.branches == ("conditional", "unconditional")


def test_edits_and_records_stay_in_their_block_and_thread(pipeline, model):
    plain = drawn(pipeline)
    unet, before = pipeline.unet, {n: len(m._forward_pre_hooks) for n, m in pipeline.unet.named_modules()}
    given = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 5, 16)
    alone, other = unet(*given).sample, []
    with model.edit(hw.ScaleHeads({"0.0": 0.0})):
        thread = threading.Thread(target=lambda: other.append(unet(*given).sample))
        thread.start()
        thread.join()
        assert not torch.equal(unet(*given).sample, alone)
        with pytest.raises(Exception, match="size"):
            unet(given[0][:, :3], *given[1:])
        assert not torch.equal(unet(*given).sample, alone)
    assert torch.equal(other[0], alone)
    assert {n: len(m._forward_pre_hooks) for n, m in unet.named_modules()} == before
    assert torch.equal(drawn(pipeline), plain)


def test_what_can_not_be_is_refused_by_name(pipeline, model):
    with model.record_steps() as steps:
        drawn(pipeline)
        with pytest.raises(hw.HeadwaterError, match="one sampling run"):
            drawn(pipeline)
    assert len(steps) == STEPS
    with pytest.raises(hw.HeadwaterError, match="maps are"):
        model.generate("a cat", record=True, maps="first")
    with pytest.raises(hw.HeadwaterError, match="has no pipeline"):
        hw.load(tiny_diffusers.dit()).generate("a cat")
    empty = type(steps)()
    with pytest.raises(hw.HeadwaterError, match="no call of the denoiser"):
        empty.statistic("entropy")
