"""What is recorded of windows (Swin) and of sampled points (Deformable DETR)? On random models: it says no more."""

import _kept
import torch
import transformers

import headwater as hw

torch.manual_seed(0)
picture = torch.randn(1, 3, 32, 64)
config = transformers.SwinConfig(
    image_size=(32, 64), patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4
)
record = hw.load(transformers.SwinModel(config).eval()).record(picture)
told = {}
for name, part in {"vision1": record, **record.parts}.items():
    grid = part.grids[0][0]
    told[f"windows, {name}"] = f"{grid.rows} rows × {grid.columns} columns, layers {part.layers}"
for layer in record.layers:
    row = record.map(layer).tile(slice(0, 1), slice(None))[0, 0, 0]
    seen = [record.strings[0][key] for key in row.nonzero()[:, 0]]
    told[f"layer {layer}, patch 0,0 sees"] = f"{len(seen)} patches, the last is {seen[-1]}"

backbone = transformers.ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16, 24], depths=[1, 1, 1], out_features=["stage2", "stage3"]
)
config = transformers.DeformableDetrConfig(
    backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    encoder_attention_heads=4, decoder_attention_heads=4, num_feature_levels=3, num_queries=5,
)  # fmt: skip
detector = hw.load(transformers.DeformableDetrForObjectDetection(config).eval())
for path, found in detector.sampled_maps(torch.randn(1, 3, 64, 128)).items():
    last = found.map.shape[2] - 1
    row = found.rows([last]).mean("head")[0]
    of_levels = [round(float(x), 3) for x in row.groupby("key_level").sum()]
    told[f"{path}, [batch, head, query, key]"] = list(found.map.shape)
    told["grids"] = [list(grid) for grid in found.grids]
    told[f"weight of {found.queries[last]} by level, {path}"] = of_levels
_kept.show(told)
