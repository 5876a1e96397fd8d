"""Names of the tokens of an image: by the tower's own parameters, or by number where these do not add up."""

from __future__ import annotations

import torch
from torch import nn

from headwater.lens.models.patches import Patches, special_names


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(8))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))  # stands in for a patch, and is no token
        self.register_tokens = nn.Parameter(torch.zeros(1, 2, 8))
        self.detection_tokens = nn.Parameter(torch.zeros(1, 1, 8))


def test_names_follow_the_parameters_in_their_order() -> None:
    assert special_names(Tower(), 3, 1) == ("[CLS]", "[REG1]", "[REG2]", "[DET1]")
    assert special_names(Tower(), 2, 0) == ("[REG1]", "[REG2]")  # which two of them is not known
    patches = Patches((4, 4), (8, 12), 3, 1, special_names(Tower(), 3, 1))
    pixels = torch.zeros(1, 3, 8, 8)
    assert (patches.grid, patches.grid_of(pixels), patches.count(pixels)) == ((2, 3), (2, 2), 8)
    assert patches.names(patches.place(pixels)) == [
        "[CLS]",
        "[REG1]",
        "[REG2]",
        "0,0",
        "0,1",
        "1,0",
        "1,1",
        "[DET1]",
    ]
    assert patches.are_patches(8).tolist() == [False] * 3 + [True] * 4 + [False]
