"""A linear recurrence position by position, as the layers are defined: what their maps are held to."""

import torch
from torch import Tensor


def recur(q: Tensor, k: Tensor, decay: Tensor, write: Tensor, v: Tensor, delta: bool) -> Tensor:
    """o [batch, head, position, c] of the recurrence; all arguments [batch, head, position, …], float64."""
    batch, heads, length, d = q.shape
    state = torch.zeros(batch, heads, d, v.shape[-1], dtype=torch.float64)
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64)
    for t in range(length):
        state = decay[:, :, t, :, None] * state
        new = v[:, :, t]
        if delta:
            new = new - torch.einsum("bhd,bhdc->bhc", k[:, :, t], state)
        state = state + torch.einsum("bhd,bhc->bhdc", k[:, :, t], write[:, :, t, None] * new)
        out[:, :, t] = torch.einsum("bhd,bhdc->bhc", q[:, :, t], state)
    return out


def example(
    length: int, d: int = 3, heads: int = 4, groups: int = 2, vector: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Random q, k [batch, group, …], log_decay, write and values of a recurrence in float64; keys of length 1."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, groups, length, d, generator=g, dtype=torch.float64) for _ in range(2))
    log_decay = -torch.rand(2, heads, length, d if vector else 1, generator=g, dtype=torch.float64)
    write = torch.rand(2, heads, length, generator=g, dtype=torch.float64)
    v = torch.randn(2, heads, length, 5, generator=g, dtype=torch.float64)
    return {"q": q, "k": k / k.norm(dim=-1, keepdim=True), "log_decay": log_decay, "write": write, "v": v}


def per_head(x: Tensor, heads: int) -> Tensor:
    """Groups repeated, so that every head has its own."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)
