"""What every block does, held to gradients: a module mixes positions where its output at one depends on another."""

from __future__ import annotations

import pytest
import torch
import transformers
from hybrid_models import HYBRIDS, built, hybrid

import headwater as hw
from headwater.lens.loading import zoo
from headwater.lens.models.stack import named

IDS = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))


def crossing_gradient(model, module):
    """The largest gradient of a module's output at position 6 with respect to what it is given at other positions."""
    given, worst = [], []

    def enter(_, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        given.append(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def leave(_, args, kwargs, output):
        output = output if isinstance(output, torch.Tensor) else output[0]
        (gradient,) = torch.autograd.grad(output[:, 6].square().sum(), given[-1], retain_graph=True)
        gradient[:, 6] = 0
        worst.append(float(gradient.abs().max()))

    hooks = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]
    with torch.enable_grad():
        model.hf(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return worst[0]


@pytest.mark.parametrize("name", HYBRIDS)
def test_mixers_are_found_by_what_they_do(name):
    _, _, mixing, attending = HYBRIDS[name]
    model = hw.load(hybrid(name))
    assert [mixer.layer for mixer in model.mixers] == mixing
    assert model.layers == attending
    assert [block.layer for block in model.stack] == [0, 1, 2, 3]
    for block in model.stack:
        kinds = [step.kind for step in block.steps]
        assert ("attention" in kinds) == (block.layer in attending)
        for step in block.steps:
            module = model.hf.get_submodule(step.path)
            assert type(module).__name__ == step.name
            assert (crossing_gradient(model, module) > 0) == (step.kind != "mlp"), step
    assert model.unread == tuple(named(model.mixers))


@pytest.mark.parametrize(
    "name", ["jamba", "falcon_h1", "lfm2", "zamba2", "minimax", "qwen3_next", "nemotron_h"]
)
def test_16_bits_hide_no_mixer_and_make_none(name):
    exact = hw.load(hybrid(name))
    coarse = hw.load(hybrid(name).to(torch.bfloat16))
    assert coarse.stack == exact.stack
    assert coarse.unread == exact.unread


@pytest.mark.parametrize("name", ["llama", "falcon", "t5", "llava", "deepseek_v3", "bert"])
def test_a_plain_model_has_no_mixers(name):
    model = hw.load(zoo.build(name))
    for part in map(model.part, model.parts):
        assert part.mixers == ()
        assert len(part.stack) == part.n_layers
        assert all("attention" in [step.kind for step in block.steps] for block in part.stack)
    assert model.unread == ()


@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_an_encoder_that_attends_by_itself_is_named(kind):
    model = hw.load(
        built(
            "LongT5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
            num_heads=4, local_radius=4, decoder_start_token_id=0, encoder_attention_type=kind,
        )
    )  # fmt: skip
    assert model.unread == ("LongT5Block (encoder.block.*)",)


def test_blocks_that_did_not_run_are_named():
    model = hw.load(built("MllamaForCausalLM", cross_attention_layers=[1, 3]))
    assert model.unread == ("MllamaCrossAttentionDecoderLayer in layers 1 and 3 (model.layers.*)",)


def test_a_convolution_in_front_of_the_blocks_is_named_and_one_that_makes_frames_is_not():
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[16] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model = hw.load(transformers.Wav2Vec2Model(config))
    assert model.unread == ("Wav2Vec2PositionalConvEmbedding (encoder.pos_conv_embed)",)
    assert model.mixers == ()


def test_opening_changes_neither_outputs_nor_buffers():
    hf = hybrid("recurrent_gemma")
    before = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    expected = hf(input_ids=IDS).logits
    torch.testing.assert_close(hw.load(hf).hf(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert all(tensor.equal(before[name]) for name, tensor in hf.state_dict().items())


def test_attention_whose_values_come_from_other_positions_is_named():
    config = transformers.ZayaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, moe_intermediate_size=16, num_experts=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hw.load(transformers.ZayaForCausalLM(config))
    assert [(mixer.layer, mixer.name) for mixer in model.mixers] == [
        (0, "ZayaAttention"),
        (1, "ZayaAttention"),
    ]
    module, values = model.attention_module(0), []
    hook = module.qkv_proj.register_forward_hook(lambda m, given, output: values.append(output[2].detach()))
    other = IDS.clone()
    other[0, 4] = 17
    model.hf(input_ids=IDS), model.hf(input_ids=other)
    hook.remove()
    assert not values[0][0, 5].equal(values[1][0, 5])  # the value at 5 is in part the token at 4
    assert values[0][0, 6].equal(values[1][0, 6])


def test_attention_that_adds_a_convolution_to_its_heads_is_named():
    hf = zoo.build("llama")
    attention = hf.model.layers[1].self_attn
    assert hw.load(hf).mixers == ()
    attention.register_forward_hook(
        lambda m, args, kwargs, out: (
            out[0] + torch.nn.functional.pad(kwargs["hidden_states"], (0, 0, 1, 0))[:, :-1],
            *out[1:],
        ),
        with_kwargs=True,
    )
    assert [mixer.path for mixer in hw.load(hf).mixers] == ["model.layers.1.self_attn"]
