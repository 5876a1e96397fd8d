"""Edits written out on whole scores, weights and outputs: closures for the dense oracle, each its edit's formula.

A function here takes the numbers of an edit and returns the change; `on(heads, change)` keeps it to some heads.
"""

from __future__ import annotations

import tiny_models
import torch

S = 17  # tokens of the prompts that are edited
Q, K = torch.arange(S)[:, None], torch.arange(S)[None, :]
ALL = {layer: list(range(tiny_models.HEADS)) for layer in range(tiny_models.LAYERS)}


def on(heads, change):
    """A closure for the oracle: `change` on the given heads of the given layers."""

    def closure(layer, x):
        new, changed = x.clone(), change(x)
        for head in heads.get(layer, []):
            new[:, head] = changed[:, head]
        return new

    return closure


def visible(w):
    """Keys that rows see, from weights: nothing that is seen weighs exactly 0 here."""
    return (w > 0).double()


def mixed(pattern, amount, rows=slice(None)):
    def change(w):
        target = pattern * visible(w)
        mass = target.sum(-1, keepdim=True)
        new = torch.where(mass > 0, (1 - amount) * w + amount * target / mass.clamp_min(1e-30), w)
        out = w.clone()
        out[:, :, rows] = new[:, :, rows]
        return out

    return change


def moved(source, to, amount, acts=None):
    def change(w):
        new = w.clone()
        mass, target = w[..., source].sum(-1, keepdim=True), w[..., to].sum(-1, keepdim=True)
        new[..., source] *= 1 - amount
        new[..., to] *= 1 + amount * mass / target
        ok = target > 1e-12
        if acts is not None:
            ok = ok & acts(w)
        return torch.where(ok, new, w)

    return change


def scaled(keys, factor, first):
    def change(w):
        w = w.clone()
        w[:, :, first:, keys] *= factor
        return w

    return change


def mixture(matrix):
    return lambda x: torch.einsum("gh,bhij->bgij", matrix, x)


def convolved(taps):
    """Over this query and the one before, and the key with its neighbours, of a causal map without padding in it."""

    def change(s):
        shown, found = s.tril(), torch.zeros_like(s)
        for a, row in enumerate(taps):
            for b, tap in enumerate(row):
                moved = torch.zeros_like(s)
                width = s.shape[-1] - abs(1 - b)
                here, there = (
                    (slice(0, width), slice(1, None)) if b == 0 else (slice(b - 1, None), slice(0, width))
                )
                moved[:, :, a:, here] = shown[:, :, : s.shape[2] - a, there]
                found += tap * moved
        return found

    return change


def pairs(seen):
    return lambda s: s.masked_fill(~seen, -torch.inf)


def emphasised(s):
    s = s.clone()
    s[:, :, 4:, [1, 2]] += 0.7 * s[:, :, 4:, [1, 2]].abs()
    return s


def biased(s):
    s = s.clone()
    s[..., [0, 5]] -= 1.5
    return s


def evicting(heavy, recent):
    def change(w):
        kept, total, out = torch.ones_like(w[:, :, 0]).bool(), torch.zeros_like(w[:, :, 0]), w.clone()
        for i in range(w.shape[2]):
            row = w[:, :, i] * kept / (1 - (w[:, :, i] * ~kept).sum(-1, keepdim=True))
            out[:, :, i] = row
            total += row
            for b in range(w.shape[0]):
                for h in range(w.shape[1]):
                    old = [j for j in range(i - recent + 1) if kept[b, h, j]]
                    best = sorted(old, key=lambda j: -float(total[b, h, j]))[:heavy]
                    kept[b, h, [j for j in old if j not in best]] = False
        return out

    return change


def sigmoid(s):
    return torch.sigmoid(s - 1.0)


def softmax1(s):
    top = s.amax(-1, keepdim=True).clamp_min(0)
    e = torch.exp(s - top)
    return e / (e.sum(-1, keepdim=True) + torch.exp(-top))


def one_key(*keys):
    return torch.isin(K, torch.tensor(keys)).double().expand(S, S)


def ids_equal(ids):
    return (ids[:, :, None] == ids[:, None, :]).tril(-1).double()[:, None]


def knock(queries, keys):
    def change(s):
        s = s.clone()
        for q in queries:
            s[:, :, q, keys] = -torch.inf
        return s

    return change


def others(*keys):
    return [j for j in range(S) if j not in keys]
