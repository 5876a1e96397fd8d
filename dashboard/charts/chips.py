"""A text as written, each token on a ground whose colour is a signed number; as HTML, which wraps by its width."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from headwater.dashboard.figures.labels import cut, visible

ROSE, FELL = "209,60,61", "33,113,181"  # red and blue, as in signed maps
DEEPEST = 0.85


def signed_chips(values: np.ndarray, tokens: Sequence[str], reach: float, said: Sequence[str]) -> str:
    """Tokens on red where their value is above zero and on blue below, full at ± `reach`; `said` is shown on hover.

    A token without a value (NaN) is grey. Tokens are escaped: whatever they contain is shown as it stands.
    """
    found = []
    for place, (value, token) in enumerate(zip(values, tokens, strict=True)):
        known = bool(np.isfinite(value))
        depth = DEEPEST * min(abs(float(value)) / reach, 1.0) if known else 0.0
        ground = f"rgba({ROSE if value > 0 else FELL},{depth:.3f})" if known else "transparent"
        style = f"background:{ground};border:1px solid rgba(128,128,128,.3);border-radius:4px;padding:1px 5px"
        style += "" if known else ";opacity:.55"
        name = html.escape(f"{place} {visible(token)}: {said[place]}", quote=True)
        found.append(f'<span style="{style}" title="{name}">{html.escape(cut(visible(token), 24))}</span>')
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px;line-height:1.6">{"".join(found)}</div>'
