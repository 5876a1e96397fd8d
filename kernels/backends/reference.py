"""The dense reference as a backend, for small inputs. Its maps compute products and statistics by another backend."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.kernels.backends.backend import Pass
from headwater.kernels.backends.blocked import Blocked
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.reference import dense
from headwater.kernels.rules.prepare import prepare
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.shapes import Keys, Queries, Values


class Reference(Blocked):
    name = "reference"
    turn = None
    prepared = False

    def attend(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        statistics: Sequence[str] = (),
    ) -> Pass:  # fmt: skip
        z, lse, _ = dense.attend(q, k, v, rule, edits)
        if not edits:
            return Pass(z, lse, (), {})
        q, k, rule = prepare(q, k, rule)
        return Pass(z, lse, super().attend(q.double(), k.double(), v.double(), rule, edits).steps, {})
