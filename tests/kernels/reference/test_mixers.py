import pytest
import torch
from recurrences import example, per_head, recur

from headwater.kernels.reference import mixers


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("vector", [False, True])
def test_dense_map_times_values_is_the_recurrence(delta: bool, vector: bool) -> None:
    given = example(9, vector=vector)
    q, k = (per_head(given[n], 4) for n in ("q", "k"))
    decay, write, v = given["log_decay"].exp(), given["write"], given["v"]
    expected = recur(q, k, decay, write, v, delta)
    torch.testing.assert_close(mixers.recurrence(q, k, decay, write, delta) @ v, expected)


def test_dense_convolution_is_torchs() -> None:
    taps = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.nn.functional.conv1d(x, taps[:, None], padding=2, groups=4)[..., :6]
    torch.testing.assert_close((mixers.convolution(taps, 6) @ x[0, ..., None])[..., 0], expected[0])
