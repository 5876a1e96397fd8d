"""The shapes that signatures in `kernels` state, in one set of axis words.

`head` counts the heads of the queries and `kv_head` those of keys and values: each serves head / kv_head query heads.
`#head` is an axis of that size, or of size 1 for all heads. `row` and `column` are those of a block of a map. The tests
check annotated calls with jaxtyping and beartype; outside of the tests nothing is checked here.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

Queries = Float[Tensor, "batch head query d_head"]
Keys = Float[Tensor, "batch kv_head key d_head"]
Values = Float[Tensor, "batch kv_head key d_value"]
Output = Float[Tensor, "batch head query d_value"]
Weights = Float[Tensor, "batch head query key"]
PerQuery = Float[Tensor, "batch head query"]  # such as the log-sum-exp of each row
PerKey = Float[Tensor, "batch head key"]  # such as the attention received
Tile = Float[Tensor, "block_batch block_head row column"]
# operands and results of `P @ x` and `P^T @ y`: c numbers per key or per query
OverKeys = Float[Tensor, "batch #head key c"]
OverQueries = Float[Tensor, "batch #head query c"]
AtQueries = Float[Tensor, "batch head query c"]
AtKeys = Float[Tensor, "batch head key c"]
# sets of keys whose weights are summed
Groups = Bool[Tensor, "group key"] | Bool[Tensor, "batch group key"]
