"""Which calls form a part, and what it is called."""

import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw


class Attend(nn.Module):
    def forward(self, x, source=None):
        q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x, x if source is None else source))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


class Both(nn.Module):
    """One module that attends to itself and then to words."""

    def __init__(self):
        super().__init__()
        self.attend = Attend()

    def forward(self, x, words):
        q, w = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x, words))
        own = F.scaled_dot_product_attention(q, q, q)
        return F.scaled_dot_product_attention(own, w, w).transpose(1, 2).flatten(2)


class Pyramid(nn.Module):
    """Halves the length after every block on the way down, and doubles it on the way up."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(Attend() for _ in range(2))
        self.up = nn.ModuleList(Attend() for _ in range(2))
        self.cross_words = Attend()

    def forward(self, x, words):
        x = self.down[0](x)[:, ::2]
        x = self.down[1](x)
        x = x + self.cross_words(x, words)
        x = self.up[0](x).repeat_interleave(2, 1)
        return self.up[1](x)


class Frames(nn.Module):
    """Attention over places in every frame, and over frames at every place."""

    def forward(self, x):
        q = x.unflatten(-1, (2, -1)).transpose(2, 3)  # batch, frame, head, place, d
        z = F.scaled_dot_product_attention(q, q, q)
        z = z.transpose(1, 3)  # batch, place, head, frame, d
        return F.scaled_dot_product_attention(z, z, z)


def test_two_calls_of_one_module_are_two_parts():
    model = hw.load(Both(), sample=(torch.randn(1, 5, 8), torch.randn(1, 3, 8)))
    assert list(model.parts) == ["self", "cross"]
    record = model.record((torch.randn(2, 6, 8), torch.randn(2, 4, 8)))
    assert record.map(0).shape == (2, 2, 6, 6)
    assert record.part("cross").map(0).shape == (2, 2, 6, 4)


def test_sizes_and_paths_tell_parts_apart():
    model = hw.load(Pyramid(), sample=(torch.randn(1, 8, 8), torch.randn(1, 4, 8)))
    assert set(model.parts) == {"self:down:8", "self:down:4", "self:up:8", "self:up:4", "cross"}
    assert model.parts["cross"].crosses  # by name: as many words as places


def test_frames_are_rows_of_their_own():
    model = hw.load(Frames(), sample=torch.randn(1, 3, 5, 8))
    record = model.record(torch.randn(2, 3, 5, 8))
    shapes = {each.map(0).shape for each in (record, *record.parts.values())}
    assert shapes == {(6, 2, 5, 5), (10, 2, 3, 3)}
    tokens = model.to_tokens(torch.randn(2, 3, 5, 8))
    assert len(tokens) == 2
    some = tokens.rows([1])
    assert {model.record(some).map(0).shape} <= {(3, 2, 5, 5), (5, 2, 3, 3)}


def test_causal_attention_is_known():
    class Causal(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)

    assert hw.load(Causal(), sample=torch.randn(1, 5, 8)).causal
    assert not hw.load(Both(), sample=(torch.randn(1, 5, 8), torch.randn(1, 3, 8))).causal


def test_attention_without_a_call_is_told():
    class TalkingAttention(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    module = nn.Sequential(TalkingAttention(), Attend(), TalkingAttention())
    model = hw.load(module, sample=torch.randn(1, 5, 8))
    assert model.unread == ("* (TalkingAttention)",)
    assert model.record(torch.randn(1, 5, 8)).provenance["not_covered"] == ["* (TalkingAttention)"]
    assert hw.load(nn.MultiheadAttention(8, 2), sample=(torch.randn(1, 5, 8),) * 3).unread == ()
