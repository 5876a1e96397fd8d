"""A pipeline of pixels (`pixels.py`): sampling, words and guidance, against loops by hand.

Seen to fail with branches exchanged, with a guidance of another sign, and without the mask.
"""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import tiny_diffusers

import headwater as hw
from headwater.lens.diffusion.pixels import PixelPipeline
from headwater.lens.errors import EditError, ModelError, PromptError

PROMPT, SEED = "a red cat", 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_diffusers.pixel_pipeline(tmp_path_factory.mktemp("pixels") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return hw.load(folder)


def by_hand(model, text, seed, away=None, heads=()):
    """Euler steps in plain torch: a call for each branch, and the identity in some heads of the perturbed one."""
    parts = model.pipeline.components
    denoiser, encoder, tokenizer = parts["transformer"], parts["text_encoder"], parts["tokenizer"]
    told = tokenizer(text, return_tensors="pt")
    width = told.input_ids.shape[1]
    none = torch.tensor([[1] + [0] * (width - 1)])
    x = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(seed))
    for step in range(3):
        now = 1 - step / 3

        def call(ids, mask, at=x, time=now):
            states = encoder(input_ids=ids).last_hidden_state
            return denoiser(
                at,
                encoder_hidden_states=states,
                timestep=torch.tensor([1000 * time]),
                encoder_attention_mask=mask,
            ).sample

        with torch.no_grad():
            plain, untold = call(told.input_ids, told.attention_mask), call(none, (none == 1).long())
            velocity = untold + 2 * (plain - untold)
            if away is not None:
                with Identity(denoiser, heads):
                    velocity = velocity + away * (plain - call(told.input_ids, told.attention_mask))
        x = x - velocity / 3
    return ((x + 1) / 2).clamp(0, 1)


class Identity:
    """Inside, heads (layer, head) of self-attention give each patch its own value: v stands for z before to_out."""

    def __init__(self, denoiser, heads):
        self.blocks, self.heads = denoiser.transformer_blocks, heads

    def __enter__(self):
        self.hooks = []
        for layer, block in enumerate(self.blocks):
            chosen = [head for at, head in self.heads if at == layer]

            def put(module, args, attn=block.attn1, chosen=chosen):
                (z,) = args
                z = z.clone().unflatten(-1, (2, -1))
                z[..., chosen, :] = self.values[attn].unflatten(-1, (2, -1))[..., chosen, :]
                return z.flatten(-2)

            def keep(module, args, out, attn=block.attn1):
                self.values[attn] = out

            self.hooks += [
                block.attn1.to_v.register_forward_hook(keep),
                block.attn1.to_out[0].register_forward_pre_hook(put),
            ]
        self.values = {}

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def test_pictures_are_euler_steps_by_hand(model):
    found = model.generate([PROMPT, "a dog"], seed=[SEED, 4], output_type="pt")
    torch.testing.assert_close(found[:1], by_hand(model, PROMPT, SEED), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1:], by_hand(model, "a dog", 4), atol=1e-5, rtol=0)
    picture = model.generate(PROMPT, seed=SEED)
    assert picture.size == (8, 4)
    assert list(picture.tobytes()) == (255 * found[0]).round().int().flatten().tolist()


def test_guidance_away_from_perturbed_heads_is_the_formula(model):
    edits = hw.recipes.soft_perturbation(["0.1", "1.0"])
    view, plain = model.part("self"), by_hand(model, PROMPT, SEED)
    found = view.generate(PROMPT, seed=SEED, against=hw.Branch(edits, weight=1.5), output_type="pt")
    expected = by_hand(model, PROMPT, SEED, 1.5, [(0, 1), (1, 0)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-3
    without = view.generate(PROMPT, seed=SEED, against=hw.Branch(edits, weight=0.0), output_type="pt")
    torch.testing.assert_close(without, plain, atol=1e-5, rtol=0)


def test_words_are_the_names_of_keys(model):
    record = model.record(PROMPT)
    assert record.part("cross").keys.strings == [["<bos>", "a", "red", "cat"]]
    assert record.strings[0] == [
        *(f"0,{n}" for n in range(4)),
        *(f"1,{n}" for n in range(4)),
    ]
    _, steps = model.generate(PROMPT, record=True)
    assert steps.record(2).part("cross").keys.strings[1] == ["<bos>", "a", "red", "cat"]
    assert steps.branches == ("unconditional", "conditional")


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("a bird", {}, "it knows a, cat, dog, red"),
        ("a a a a a a", {}, "7 tokens; the model reads at most 6"),
        ([], {}, "a prompt is a text"),
        (PROMPT, {"seed": [1, 2]}, "one for each of the 1 prompts"),
        (PROMPT, {"num_inference_steps": 0}, "from 1 to 10000"),
        (PROMPT, {"output_type": "latent"}, "'pil' or 'pt'"),
        (PROMPT, {"seed": 2**80}, "one for each of the 1 prompts"),
        (PROMPT, {"seed": "3"}, "one for each of the 1 prompts"),
        (PROMPT, {"guidance_scale": float("nan")}, "guidance_scale is a finite number"),
        (PROMPT, {"guidance_scale": "2"}, "guidance_scale is a finite number"),
        (None, {}, "a prompt is a text"),
    ],
)
def test_other_prompts_and_options_are_refused(model, given, options, said):
    with pytest.raises(PromptError, match=said):
        model.generate(given, **options)


def test_a_module_alone_has_no_perturbed_branch_and_no_words():
    model = hw.load(tiny_diffusers.pixart())
    with pytest.raises(ModelError, match=r"recipes\.guided"):
        model.generate(PROMPT, against=hw.Branch([hw.TowardIdentity(1.0)]))
    with pytest.raises(PromptError, match="reads tensors"):
        model.record(PROMPT)


def test_a_branch_with_a_prompt_is_refused(model):
    with pytest.raises(PromptError, match="without prompt"):
        model.generate(PROMPT, against=hw.Branch([hw.TowardIdentity(1.0)], prompt="a dog"))


def test_an_edit_of_another_branch_is_refused_where_there_is_none(model):
    with (
        pytest.raises(EditError, match="no branch 'perturbed'"),
        model.part("self").edit(hw.AtSteps(hw.TowardIdentity(1.0), branch="perturbed")),
    ):
        model.generate(PROMPT)


def other_scheduler(model, kind, **options):
    """The pipeline with another scheduler of diffusers, by the words of its class."""
    parts = model.pipeline
    scheduler = getattr(diffusers, kind)(**options)
    return PixelPipeline(parts.denoiser, parts.text_encoder, parts.tokenizer, scheduler, 4, 8, 1.0, 3)


def test_a_scheduler_that_draws_noise_draws_that_of_the_seed(model):
    pipeline = other_scheduler(model, "DDPMScheduler", clip_sample=False)
    torch.manual_seed(1)
    both = pipeline(["a dog", PROMPT], seed=[5, 6], output_type="pt")
    torch.manual_seed(2)
    alone = pipeline(PROMPT, seed=6, output_type="pt")
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
def test_a_scheduler_of_other_noise_keeps_its_own_levels(model):
    """Euler steps of a diffusion with noise levels σ, x' = x + (σ' - σ)·ε, by hand."""
    pipeline = other_scheduler(model, "EulerDiscreteScheduler", timestep_spacing="leading")
    given = pipeline(PROMPT, seed=SEED, output_type="pt")
    plain = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")
    plain.set_timesteps(3)
    told = pipeline.tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        states = pipeline.text_encoder(input_ids=told.input_ids).last_hidden_state
        x = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(SEED))
        x = x * (plain.sigmas[0] ** 2 + 1) ** 0.5
        for time, now, after in zip(plain.timesteps, plain.sigmas, plain.sigmas[1:], strict=False):
            noise = pipeline.denoiser(
                x / (now**2 + 1) ** 0.5, encoder_hidden_states=states, timestep=time[None],
                encoder_attention_mask=told.attention_mask,
            ).sample  # fmt: skip
            x = x + (after - now) * noise
    torch.testing.assert_close(given, ((x + 1) / 2).clamp(0, 1), atol=1e-4, rtol=0)


def test_pixels_that_are_no_numbers_are_refused(model):
    with pytest.raises(ModelError, match="not finite"):
        model.generate(PROMPT, guidance_scale=1e38)
