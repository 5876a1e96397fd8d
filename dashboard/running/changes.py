"""What changed between runs A and B: the answers, the loss of each token, the attention of each head, the text."""

from __future__ import annotations

import difflib
import re

import numpy as np
import pandas as pd
import torch
import xarray as xr

from headwater.dashboard.running.models import resident
from headwater.dashboard.running.runs import Run, editing
from headwater.lens.progress import progress

UNCHANGED = 1e-6  # a change of a weight that float32 arithmetic makes by itself


def comparable(one: Run, other: Run) -> bool:
    """Whether the maps of both are of the same heads and the same number of tokens."""
    same = (one.layers, one.n_heads) == (other.layers, other.n_heads)
    return same and (len(one.queries), len(one.keys)) == (len(other.queries), len(other.keys))


def divergence(one: Run, other: Run) -> float | None:
    """KL(A‖B) of the answers, in nats; None where they are not answers of one kind."""
    if not one.logits.size or one.logits.shape != other.logits.shape:
        return None
    p, q = one.log_probabilities(), other.log_probabilities()
    return float(max(0.0, (np.exp(p) * (p - q)).sum()))


def answers(one: Run, other: Run, count: int = 10) -> pd.DataFrame:
    """The likeliest answers of either run, the likeliest of A first, with log-probabilities and ranks in both."""
    known = [run.log_probabilities() for run in (one, other)]
    best = np.maximum(*known)
    chosen = np.argsort(-best, kind="stable")[:count]
    chosen = chosen[np.argsort(-known[0][chosen], kind="stable")]
    ranks = []
    for each in known:
        place = np.empty(len(each), dtype=int)
        place[np.argsort(-each, kind="stable")] = np.arange(1, len(each) + 1)
        ranks.append(place[chosen])
    a, b = (each[chosen] for each in known)
    return pd.DataFrame(
        {
            "answer": [one.label(int(each)) for each in chosen],
            "id": chosen,
            "p A": np.exp(a),
            "p B": np.exp(b),
            "log p A": a,
            "log p B": b,
            "change of log p": b - a,
            "rank A": ranks[0],
            "rank B": ranks[1],
        }
    )


def token_losses(run: Run) -> np.ndarray | None:
    """The loss of each token of the text, given those before it, in nats; NaN where it has none, such as the first."""
    return None if run.losses is None else np.concatenate([[np.nan], run.losses])


def moved(one: Run, other: Run) -> xr.DataArray:
    """Share of attention that an edit moved, per head [layer, head]: the mean over queries of ½ Σ|A_B − A_A|."""
    found = np.zeros((len(one.layers), one.n_heads))
    for place, layer in enumerate(progress(one.layers, desc="attention that moved", unit="layer")):
        count = 0
        for (_, a), (_, b) in zip(
            one.record.map(layer).row_blocks(), other.record.map(layer).row_blocks(), strict=True
        ):
            change = (b[0].double() - a[0].double()).abs().nan_to_num(0.0)
            found[place] += change.sum((-2, -1)).numpy() / 2
            count += a.shape[-2]
        found[place] /= max(count, 1)
    return xr.DataArray(
        found, dims=("layer", "head"), coords={"layer": one.layers, "head": range(one.n_heads)}, name="moved"
    )


def most_moved(moves: xr.DataArray) -> tuple[int, int]:
    """The head whose attention moved most, as (layer, head)."""
    row, head = np.unravel_index(int(np.argmax(moves.values)), moves.shape)
    return int(moves["layer"].values[row]), int(head)


def continued(run: Run, new_tokens: int) -> str:
    """The text that the model of a run writes on after its input, under its edits; the input is left out."""
    model = resident(run.name)
    assert model.tokenizer is not None, "a model that writes has a tokenizer"
    with torch.no_grad(), editing(run):
        tokens = model.to_tokens(run.example)
        out = model.generate(tokens, new_tokens)
    ids = out if isinstance(out, torch.Tensor) else out.ids
    return model.tokenizer.decode(ids[0, 0 if model.is_encoder_decoder else tokens.ids.shape[1] :])


def differing(one: str, other: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts as pieces, each with whether it stands in that text alone."""
    words = [re.findall(r"\s*\S+|\s+$", text) for text in (one, other)]
    found: tuple[list, list] = ([], [])
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, (first, last) in enumerate(((a0, a1), (b0, b1))):
            if first < last:
                found[side].append(("".join(words[side][first:last]), kind != "equal"))
    return found
