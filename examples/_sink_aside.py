"""How good an order of tokens is, of all tokens and with the attention sink set aside."""

import numpy as np
from _kept import interval

from headwater import analyses


def with_and_without(model, prompts, weights, truth, real, others, seed):
    """Agreement of weights [prompt, token] with the sizes of `truth`, and the drop without their first tokens.

    `real` are the tokens of each prompt, `others` those that are no sink. With the sink set aside agreement is that of
    the others alone, and the sink comes last in the order. Each is a mean with the bounds of 95 % of redrawn prompts.
    """
    first = np.abs(weights[np.arange(len(weights)), real.argmax(1)])
    found = {"first token": first / np.nansum(np.abs(weights), 1)}
    orders = {"": weights, ", others": np.where(others | ~real, weights, np.nanmin(weights) - 1)}
    drop = analyses.faithfulness(model, prompts, orders, steps=1, seed=seed).comprehensiveness
    for of, kept in (("", real), (", others", others)):
        texts = zip(np.abs(weights), np.abs(truth), kept, strict=True)
        found[f"agreement{of}"] = [analyses.between(x[k], y[k], by="spearman") for x, y, k in texts]
        found[f"drop{of}"] = drop.sel(attribution=of)
    return {what: interval(values, seed) for what, values in found.items()}
