"""Which word does each patch of a picture look at, step by step, while a diffusion model draws it?

Give a folder with a Stable Diffusion pipeline and a prompt: `python watch_words_over_steps.py FOLDER "a red cat"`.
Without them a network with random weights shows what is printed.
"""

import sys

import diffusers
import torch

import headwater as hw

if len(sys.argv) > 2:
    model = hw.load(diffusers.DiffusionPipeline.from_pretrained(sys.argv[1]))
    _, steps = model.generate(sys.argv[2], num_inference_steps=10, record=True)
else:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    model = hw.load(unet)
    x, words = torch.randn(1, 4, 8, 8), torch.randn(2, 5, 16)
    with model.record_steps(("unconditional", "conditional")) as steps, torch.no_grad():
        for time in (900, 600, 300):
            unguided, guided = unet(torch.cat([x, x]), time, words).sample.chunk(2)
            x = x - 0.1 * (unguided + 5 * (guided - unguided))

for part in (name for name in model.parts if name.startswith("cross")):
    received = steps.statistic("received", part).sel(branch="conditional").isel(batch=0)
    share = received.mean(("layer", "head"))
    share = share / share.sum("key")
    print(f"{part}: share of attention that each word receives")
    print("  time  " + "  ".join(f"{str(word)[:8]:>8}" for word in share.token.values))
    for step in range(len(steps)):
        told = "  ".join(f"{float(value):8.3f}" for value in share.isel(step=step))
        print(f"  {steps.timesteps[step]:4.0f}  {told}")
