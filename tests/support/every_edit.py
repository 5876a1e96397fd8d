"""Edits of every kind, with what JSON and Python must be able to say of them."""

import numpy as np
import torch

import headwater as hw
from headwater.lens.naming.heads import Head

SERIAL = [
    hw.ScaleHeads({"2.3": 0.0}),
    hw.AblateHeads(["1.0", "1.1"], ablation="mean", examples=["a b", "c"]),
    hw.Knockout(-1, slice(0, 4), heads="0.1", layers="all"),
    hw.Redistribute(keys=[0], keep=0.25, to=[3, -1], layers=[1, 2]),
    hw.TowardIdentity(0.5),
    hw.Temperature(2.0, heads=["0.0"]),
    hw.OffsetHeads({"5.1": [0.5, 1.0]}), hw.TowardUniform(0.5, heads="5.1", rows=[0]),
    hw.InjectPattern({"keys": ["token:Mary", 0]}, 0.5, queries=-1), hw.InjectPattern([[1.0, 0.0], [0.5, 0.5]]),
    hw.BiasKeys(slice(0, 4), -2.0, heads=(5, 1)), hw.Normaliser("sigmoid", bias=-1.0), hw.HeavyHitters(4, 8),
    hw.RedistributeMassive([3], 0.5, layers=[1]),
    hw.MoveAttention("image", "text", 0.5, layers=[1]), hw.FreezeAttention("run.safetensors", 0.5),
    hw.EditResidual(1, "project_out", [1.0, 2.0], place="mid"), hw.EditMLP(0, "add", [[1.0], [2.0]], positions="sub"),
    hw.HeadMix(torch.eye(2), [[0.5, 0.5], [1.0, 0.0]], heads="0.1"), hw.HeadMix(convolution=[[0.25, 0.5]], rows=[1]),
    hw.ScaleWeights("image", 1.5, heads="1.0", queries=[-1]),
    hw.Emphasise("image", 0.7, queries=-1), hw.StreamingWindow(4, 10), hw.GroupedAttention(8, shift=4, sinks=2),
    hw.PositionInvariant([[0, 2], [2, 4]]),
    hw.PruneTokens({1: 0.5, 3: 8}, [0.5, 1.0], "image", recycle=1, prior=[[1.0, 2.0]], mix=0.25),
    hw.MaskPairs({"kind": "windows", "grid": [2, 3], "size": 2}, heads="1.0"), hw.MaskPairs(torch.eye(3) > 0),
    hw.MaskPairs({"kind": "tree", "documents": [[0, 2], [2, 4]], "parents": [None, 0]}, rows=[0]),
    hw.Redistribute("sinks:act", where={"of": [1], "within": slice(1, 9), "most": 0.5, "least": 0.2}),
    hw.TowardIdentity(0.5, heads=np.array([3, 4])), hw.Temperature(2.0, heads=torch.tensor([[True, False]])),
    hw.AtSteps(hw.Knockout("all", [2], rows=[0]), slice(1, 3), "conditional"),
    hw.AtSteps(hw.ScaleHeads({"1.2": 0.0}), [0, 4]), hw.ScaleHeads({Head(1, 2): 0.5}, rows=1),
    hw.AblateHeads([Head(0, 1)]), hw.Knockout("generated", ["image", 0]),
]  # fmt: skip
