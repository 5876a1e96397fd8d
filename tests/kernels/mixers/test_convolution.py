import torch

from headwater.kernels.mixers.convolution import ConvolutionMap
from headwater.kernels.reference import mixers as reference


def test_map_is_the_causal_convolution_of_torch() -> None:
    g = torch.Generator().manual_seed(0)
    taps = torch.randn(5, 3, generator=g, dtype=torch.float64)
    for length in (1, 2, 9):
        x = torch.randn(2, 5, length, 1, generator=g, dtype=torch.float64)
        map = ConvolutionMap(taps, 2, length)
        out = torch.nn.functional.conv1d(x[..., 0], taps[:, None], padding=2, groups=5)[..., :length]
        torch.testing.assert_close((map @ x)[..., 0], out)
        dense = reference.convolution(taps, length).expand(2, -1, -1, -1)
        torch.testing.assert_close(map.dense(), dense)
        torch.testing.assert_close(map.T @ x, dense.mT @ x)
        torch.testing.assert_close(
            map.tile(slice(1, 7), slice(0, 5), [4, 0]), dense[:, [4, 0], 1:7, 0:5], check_stride=False
        )
