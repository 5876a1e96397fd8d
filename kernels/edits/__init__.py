"""What an edit of attention is, as tensors: it acts on scores, then on weights, then on a head's output.

`scores.py`: s -> tau*s, s + bias, s + amount*|s|, or -inf on a set of pairs. `weights.py`: P scaled on a key set,
with the freed mass handed to another or not, or mixed with the identity or a pattern (`patterns.py`). `mixing.py`:
each head a mixture of all heads, or of neighbouring pairs. `outputs.py`: z -> gate*z, z + values, or replaced. The
dense meaning of each stands in `kernels/reference/dense.py`. Head masks are bool [head] or [batch|1, head]; positions
are bool [batch|1, query] or [batch|1, key].
"""
