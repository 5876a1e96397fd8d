"""Ordinary least squares of vectors on vectors: one weight per term for all coordinates, and a constant vector.

`target_p ≈ Σ_t weight_t·term_tp + intercept`, stacked over coordinates and texts. The mean of each term over texts is
subtracted and goes into the intercept; a term that is the same in every text has no weight (NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headwater.analyses._measures.bootstrap import bounds
from headwater.lens.errors import AnalysisError
from headwater.lens.progress import progress

SAME = 1e-6  # relative to the longest term: a smaller variation may be float32 rounding of a constant
WORST = 1e6  # condition number of the terms at length 1, above which a weight is rounding
SLICE = 64  # redrawings whose means are in memory at once


@dataclass(frozen=True, eq=False)
class ScalarFit:
    """`weight` [term], its variance inflation factor `inflation` [term] (1: no other term is like it), `intercept`
    [coordinate], `mean` [coordinate] of the targets, and the `condition` number of the terms.
    """

    weight: np.ndarray
    inflation: np.ndarray
    intercept: np.ndarray
    mean: np.ndarray
    condition: float

    @classmethod
    def of(cls, terms: np.ndarray, target: np.ndarray) -> ScalarFit:
        """The fit of targets [text, coordinate] on terms [text, term, coordinate], in float64."""
        count, known, _ = terms.shape
        if count <= known:
            raise AnalysisError(
                f"{known} weights can not be fitted on {count} texts; give more than {2 * known} different texts (half "
                "of them are kept to judge the fit), or name fewer heads"
            )
        means, mean = terms.mean(0), target.mean(0)
        stacked = (terms - means).transpose(1, 0, 2).reshape(known, -1)
        length = np.linalg.norm(stacked, axis=1)
        # compared with the length of the terms: what they vary by may be rounding in all of them
        varies = length > SAME * max(np.linalg.norm(terms, axis=(0, 2)).max(), 1e-300)
        unit = stacked[varies] / length[varies, None]
        weight, inflation = np.full(known, np.nan), np.full(known, np.nan)
        condition = 1.0
        if varies.any():
            base, triangle = np.linalg.qr(unit.T)
            left, values, right = np.linalg.svd(triangle)
            condition = float(values[0] / max(values[-1], 1e-300))
            if condition > WORST:
                raise AnalysisError(
                    f"the terms are nearly combinations of each other (condition {condition:.1e}, above {WORST:.0e}), "
                    "so that no weight is one term's own; name fewer heads"
                )
            solved = right.T @ ((left.T @ (base.T @ (target - mean).ravel())) / values)
            weight[varies] = solved / length[varies]
            inflation[varies] = ((right.T / values) ** 2).sum(1)
        intercept = mean - np.nan_to_num(weight) @ means
        return cls(weight, inflation, intercept, mean, condition)

    def parts(self, terms: np.ndarray) -> np.ndarray:
        """`weight_t·term_tp`, [text, term, coordinate]; 0 for a term without a weight."""
        return np.nan_to_num(self.weight)[:, None] * terms

    def explained(self, terms: np.ndarray, target: np.ndarray) -> float:
        """R²: 1 less the squared error over the squared error of the mean of the fitted texts."""
        error = target - self.parts(terms).sum(1) - self.intercept
        total = np.square(target - self.mean).sum()
        return float(1 - np.square(error).sum() / total) if total > 0 else float("nan")

    def bounds(
        self, terms: np.ndarray, target: np.ndarray, draws: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval of each weight over redrawn texts; each drawing has its own intercept."""
        varies = np.isfinite(self.weight)
        low, high = np.full(len(varies), np.nan), np.full(len(varies), np.nan)
        if varies.any():
            low[varies], high[varies] = bounds(_redrawn(terms[:, varies], target, draws, seed))
        return low, high


def _redrawn(terms: np.ndarray, target: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Weights [draw, term], from products that are computed once per text."""
    count = len(terms)
    scale = np.linalg.norm(terms - terms.mean(0), axis=(0, 2))
    terms = terms / scale[:, None]
    products = np.einsum("ptd,psd->pts", terms, terms)
    crossed = np.einsum("ptd,pd->pt", terms, target)
    generator = np.random.default_rng(seed)
    found = []
    for start in progress(range(0, draws, SLICE), desc="weights redrawn", unit="slice"):
        times = (
            generator.multinomial(count, np.full(count, 1 / count), size=min(SLICE, draws - start)) / count
        )
        means = np.tensordot(times, terms, 1)  # [draw, term, coordinate]
        left = np.tensordot(times, products, 1) - means @ means.transpose(0, 2, 1)
        right = times @ crossed - np.einsum("ntd,nd->nt", means, times @ target)
        # in a drawing a term may be constant: the pseudo-inverse gives the shortest solution
        solved = np.linalg.pinv(left, rcond=1e-10, hermitian=True) @ right[..., None]
        found.append(solved[..., 0] / scale)
    return np.concatenate(found)
