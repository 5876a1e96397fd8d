"""Modules outside transformers (`meeting.py`, `module.py`, `model.py`): maps by hand, outputs, edits, refusals."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw
from headwater.lens.foreign.model import ForeignModel


class Own(nn.Module):
    """Attention as anybody writes it; it keeps what it gave to torch."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.seen = None

    def forward(self, x, source=None, mask=None):
        source = x if source is None else source

        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(source)), split(self.v(source))
        self.seen = q, k
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(z.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Blocks of self-attention, cross-attention and an MLP."""

    def __init__(self, depth=2, width=12):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"own": Own(width), "other": Own(width), "mlp": nn.Linear(width, width)})
            for _ in range(depth)
        )

    def forward(self, x, words):
        for block in self.blocks:
            x = x + block["own"](x)
            x = x + block["other"](x, words)
            x = x + block["mlp"](x).relu()
        return {"sample": x}


def by_hand(q, k):
    q, k = q.double(), k.double()
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).float()


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack().eval()


def test_maps_are_the_softmax_by_hand(stack):
    model = hw.load(stack, sample=(torch.randn(1, 4, 12), torch.randn(1, 3, 12)))
    assert list(model.parts) == ["self", "cross"]
    assert model.n_layers == 2
    given = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    record = model.record(given)
    for layer, block in enumerate(stack.blocks):
        torch.testing.assert_close(record.map(layer).dense(), by_hand(*block["own"].seen))
        torch.testing.assert_close(record.part("cross").map(layer).dense(), by_hand(*block["other"].seen))
    torch.testing.assert_close(model(given)["sample"], stack(*given)["sample"])


def test_edits_of_heads_are_those_of_the_module_by_hand(stack):
    given = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    model = hw.load(stack, sample=given)
    with model.part("cross").edit(hw.ScaleHeads({"1.2": 0.0})):
        found = model.embeddings(given)
    with torch.no_grad():
        stack.blocks[1]["other"].out.weight[:, 8:] = 0  # features of head 2
    torch.testing.assert_close(found, stack(*given)["sample"])


def test_knocked_out_keys_are_a_mask_of_the_module(stack):
    x = torch.randn(2, 6, 12)
    module = stack.blocks[0]["own"]
    model = hw.load(module, sample=x)
    with model.edit(hw.Knockout(queries="all", keys=[0, 3])):
        found = model(x)
    seen = torch.ones(6, dtype=torch.bool)
    seen[[0, 3]] = False
    torch.testing.assert_close(found, module(x, mask=seen.expand(6, 6)))


def test_head_outputs_give_the_output(stack):
    x, module = torch.randn(2, 6, 12), stack.blocks[0]["own"]
    z = hw.load(module, sample=x).head_outputs(x)
    assert z.shape == (2, 1, 3, 6, 4)
    torch.testing.assert_close(module.out(z[:, 0].transpose(1, 2).flatten(2)), module(x))


def test_gradients_at_gates_are_those_of_the_plain_module(stack):
    x, module = torch.randn(2, 6, 12), stack.blocks[0]["own"]
    model = hw.load(module, sample=x)
    found = hw.analyses.head_importance(model, x, loss=lambda out, tokens: out.square().mean((1, 2)))
    z = model.head_outputs(x)[:, 0].requires_grad_()
    module.out(z.transpose(1, 2).flatten(2)).square().mean((1, 2)).sum().backward()
    expected = (z.grad * z).sum((2, 3)).abs().mean(0).detach()
    torch.testing.assert_close(torch.tensor(found.values)[0].float(), expected)


PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder(first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not first).eval()
    x = torch.randn(2, 7, 16)
    model = hw.load(encoder, sample=x)
    given = {"src": x, "src_key_padding_mask": PADDING}
    record = model.record(given)
    assert record.valid.equal(~PADDING)
    with torch.no_grad():
        plain = encoder(**given)
        torch.testing.assert_close(model(given)[~PADDING], plain[~PADDING])
        own = encoder.layers[0]
        into = own.norm1(x) if first else x
        _, weights = own.self_attn(into, into, into, key_padding_mask=PADDING, average_attn_weights=False)
    found = record.map(0).dense()
    torch.testing.assert_close(found[0], weights[0])
    torch.testing.assert_close(found[1, :, :5], weights[1, :, :5])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_torchs_encoder_and_decoder(batch_first):
    torch.manual_seed(0)
    module = nn.Transformer(16, 4, 2, 2, 32, batch_first=batch_first).eval()

    def put(t):
        return t if batch_first else t.transpose(0, 1)

    model = hw.load(module, sample=(put(torch.randn(2, 7, 16)), put(torch.randn(2, 5, 16))))
    assert list(model.parts) == ["self:decoder", "self:encoder", "cross"]
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    given = {"src": put(torch.randn(3, 9, 16)), "tgt": put(torch.randn(3, 6, 16)), "tgt_mask": causal}
    torch.testing.assert_close(model(given), module(**given))
    record = model.record(given)
    assert record.tokens.shape == (3, 6)
    assert not record.map(0).dense().triu(1).any()
    assert record.part("self:encoder").map(0).shape == (3, 4, 9, 9)
    assert record.part("cross").map(1).shape == (3, 4, 6, 9)
    rows = model.to_tokens(given).rows([2, 0])
    torch.testing.assert_close(put(model(rows)), put(module(**given))[[2, 0]])


@pytest.mark.parametrize("learned", [True, False])
def test_weights_that_a_module_asks_of_torch_are_the_edited_ones(learned):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=learned).eval()
    x = torch.randn(2, 5, 16)
    model = hw.load(module, sample={"query": x, "key": x, "value": x, "key_padding_mask": PADDING[:, 2:]})
    given = {"query": x, "key": x, "value": x, "key_padding_mask": PADDING[:, 2:]}
    for found, expected in zip(model(given), module(**given), strict=True):
        torch.testing.assert_close(found, expected)
    with model.edit(hw.Knockout(queries="all", keys=1)):
        assert not model(given)[1][:, :3, 1].any()


def test_places_count_from_the_first_real_token(stack):
    x, module = torch.randn(2, 6, 12), stack.blocks[0]["own"]
    seen = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    seen[1, ..., :2] = False
    model = hw.load(module, sample={"x": x, "mask": seen})
    with model.edit(hw.Knockout(queries="all", keys=0)):
        found = model(x, mask=seen)
    seen = seen.clone()
    seen[0, ..., 0] = seen[1, ..., 2] = False
    torch.testing.assert_close(found[0], module(x, mask=seen)[0])
    torch.testing.assert_close(found[1, 2:], module(x, mask=seen)[1, 2:])


def test_each_mask_tells_its_own_padding(stack):
    x = torch.randn(1, 4, 12)
    model = hw.load(stack.blocks[0]["own"], sample=x)
    for real in (
        torch.tensor([True, True, False, False]),
        torch.ones(4).bool(),
        torch.tensor([True, True, True, False]),
    ):
        record = model.record(x, mask=real.view(1, 1, 1, 4))
        assert record.valid[0].equal(real)


def test_a_layer_that_runs_again_is_another_layer(stack):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = stack.blocks[0]["own"]

        def forward(self, x):
            for _ in range(3):
                x = x + self.block(x)
            return x

    x, module = torch.randn(2, 6, 12), Shared()
    model = hw.load(module, sample=x)
    assert model.layers == [0, 1, 2]
    with model.edit(hw.ScaleHeads(dict.fromkeys(("1.0", "1.1", "1.2"), 0.0))):
        found = model(x)
    first = x + module.block(x)
    second = first + module.block.out.bias
    torch.testing.assert_close(found, second + module.block(second))


def test_another_thread_is_not_met(stack):
    x, module = torch.randn(2, 6, 12), stack.blocks[0]["own"]
    model, found = hw.load(module, sample=x), []
    with model.edit(hw.ScaleHeads({"0.0": 0.0})):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
        assert not torch.allclose(model(x), module(x))
    torch.testing.assert_close(found[0], module(x))


def test_records_are_saved_and_opened(stack, tmp_path):
    given = {"x": torch.randn(2, 6, 12), "mask": (torch.rand(6, 6) > 0.3) | torch.eye(6, dtype=torch.bool)}
    model = hw.load(stack.blocks[0]["own"], sample=given)
    record = model.record(given)
    record.save(tmp_path / "own.safetensors")
    again = hw.Record.open(tmp_path / "own.safetensors")
    torch.testing.assert_close(again.map(0).dense(), record.map(0).dense())
    torch.testing.assert_close(again.statistics["entropy"], record.statistics["entropy"])


class Block(nn.Module):
    """A block of a timm ViT, written from its forward: qkv in one, norms of queries and keys, fused attention."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = heads, width // heads, True
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x):
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        z = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return x + self.proj(z.transpose(1, 2).reshape(batch, count, width))


def test_a_vision_transformer_written_as_timm_writes_it():
    torch.manual_seed(0)
    patches = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.Flatten(2))

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.blocks, self.head = patches, nn.Sequential(Block(), Block()), nn.Linear(12, 5)

        def forward(self, image):
            return self.head(self.blocks(self.patches(image).mT).mean(1))

    module, image = Vision().eval(), torch.randn(2, 3, 12, 12)
    model = hw.load(module, sample=image)
    torch.testing.assert_close(model(image), module(image))
    assert model.record(image).map(1).shape == (2, 3, 9, 9)


class ByHand(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class Random(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.2)


@pytest.mark.parametrize(
    ("module", "sample", "why"),
    [
        (ByHand(), torch.randn(1, 2, 4), "no call of scaled_dot_product_attention was met when ByHand"),
        (Random(), torch.randn(1, 2, 4), "dropout_p=0.2 in eval mode too"),
        (ByHand(), None, "give what its forward takes"),
        (ByHand(), {"y": torch.randn(1, 2, 4)}, "takes no 'y'"),
        (ByHand(), "text", "holds no tensor"),
        (nn.Linear(3, 3), torch.randn(1, 2, 4), "Linear fails on the sample: RuntimeError"),
        (
            torch.compile(ByHand(), backend="eager"),
            torch.randn(1, 2, 4),
            "load.. the module before torch.compile",
        ),
        (nn.MultiheadAttention(4, 1, device="meta"), torch.randn(1, 2, 4), "is on the meta device"),
    ],
)
def test_refusals(module, sample, why):
    with pytest.raises(hw.HeadwaterError, match=why):
        hw.load(module, sample=sample)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_is_refused_by_name():
    from torch.nn.attention.flex_attention import flex_attention

    class Flexible(nn.Module):
        def forward(self, x):
            return flex_attention(x, x, x)

    with pytest.raises(hw.HeadwaterError, match="such as flex_attention"):
        hw.load(Flexible(), sample=torch.randn(1, 2, 4, 16))


@pytest.mark.parametrize("low", ["autocast", "weights"])
def test_low_precision(low):
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    exact = module(x, x, x, need_weights=False)[0]
    if low == "weights":
        module, x = module.bfloat16(), x.bfloat16()
    model = hw.load(module, sample=(x, x, x))
    with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
        found = model.embeddings((x, x, x))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0)


def test_a_module_in_training_mode_is_refused_when_it_runs(stack):
    model = hw.load(stack.blocks[0]["own"], sample=torch.randn(1, 3, 12))
    stack.train()
    with pytest.raises(hw.HeadwaterError, match="training mode"):
        model(torch.randn(1, 3, 12))


def test_what_has_no_meaning_is_refused_by_name(stack):
    model = hw.load(stack.blocks[0]["own"], sample=torch.randn(1, 3, 12))
    assert isinstance(model, ForeignModel)
    with pytest.raises(hw.HeadwaterError, match="give a loss= of its output"):
        model.loss(torch.randn(1, 3, 12))
    with pytest.raises(hw.HeadwaterError, match="generates nothing with it"):
        model.generate(torch.randn(1, 3, 12))
    with pytest.raises(hw.HeadwaterError, match="takes no 'y'"):
        model(y=torch.randn(1, 3, 12))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_examples_keep_their_padding_in_analyses():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    given = {"src": torch.randn(2, 7, 16), "src_key_padding_mask": PADDING}
    model = hw.load(encoder, sample=given)

    def loss(out, tokens):
        return (out.square().mean(-1) * tokens.mask).sum(-1)

    every = hw.analyses.head_importance(model, given, loss=loss, per_example=True)
    alone = hw.analyses.head_importance(
        model, given["src"][1:, :5], loss=lambda out, _: out.square().mean(-1).sum(-1)
    )
    torch.testing.assert_close(torch.tensor(every.values[1]), torch.tensor(alone.values))
    with pytest.raises(hw.HeadwaterError, match="the blocks of TransformerEncoder are not known"):
        hw.analyses.value_zeroing(model, given)


def test_a_refused_module_is_as_it_was(stack):
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    with pytest.raises(hw.HeadwaterError, match="no call"):
        hw.load(module, sample=torch.randn(1, 3))
    assert module.training
    assert module[1].training
    hw.load(stack.train(), sample=(torch.randn(1, 3, 12), torch.randn(1, 2, 12)))
    assert not stack.training
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    hw.load(stack, sample=(torch.ones(1, 3, 12), torch.ones(1, 2, 12)))
    assert torch.rand(1).equal(drawn)


def test_examples_of_a_module_stand_under_each_other_again(stack):
    model = hw.load(stack, sample=(torch.randn(2, 4, 12), torch.randn(2, 3, 12)))
    both = model.to_tokens((torch.randn(3, 4, 12), torch.randn(3, 5, 12)))
    again = type(both).joined([both.rows([n]) for n in range(3)])
    assert all(torch.equal(given, again.more[name]) for name, given in both.more.items())
    torch.testing.assert_close(model(again)["sample"], model(both)["sample"])
    assert {key: side.ids.shape for key, side in again.axes.items()} == {
        key: side.ids.shape for key, side in both.axes.items()
    }
