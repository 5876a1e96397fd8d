"""Where do the attention sinks of SmolLM2 lie, what makes them, and what do they carry?"""

import torch
from _kept import QUICK, interval, keep, passages

import headwater as hw
from headwater import analyses

SEED, N, LENGTH = 0, 2 if QUICK else 16, 64
model = hw.load("smollm2-135m")
plain = passages(model, N, LENGTH, SEED)
begun = torch.cat([torch.full((N, 1), model.tokenizer.bos_token_id), plain[:, :-1]], 1)
told = {"passages": N, "tokens": LENGTH, "seed": SEED}


def per_passage(values):  # mean and bounds over passages of the mean over layers and heads
    return interval(values.mean([dim for dim in values.dims if dim != "batch"]), SEED)


records = {"no bos": model.record(plain, keep=("qkv", "residual")), "bos": model.record(begun)}
for name, record in records.items():
    for key in (0, 1, 8):
        share = analyses.sink_rate(record, key=key)["received_share_per_example"]
        told[f"sink rate, {name}, token {key}"] = per_passage(share > 0.3)
inputs = analyses.sink_inputs(model, plain, length=LENGTH, seed=SEED)
for kind in ("random", "repeated"):
    told[f"sink rate, {kind} tokens"] = per_passage(inputs.rate.sel(input=kind))
rate = analyses.sink_rate(records["no bos"]).received_share
told["share by layer"] = rate.mean("head").round(2).values.tolist()

written = []  # what each MLP adds to the residual stream
hooks = [
    block.mlp.register_forward_hook(lambda *call: written.append(call[-1])) for block in model.hf.model.layers
]
model(plain)
for hook in hooks:
    hook.remove()
record = records["no bos"]
stream = torch.stack([record.residual(layer) for layer in record.layers])  # [layer, passage, token, channel]
size = stream[:, :, 0].abs().mean(1)
channel = int(size.amax(0).argmax())
jump = int(size[:, channel].diff().argmax())
median = stream[jump + 1].abs().flatten(1).median(-1).values
told["massive activation: channel, layer whose MLP makes it"] = [channel, jump]
told["the next largest channels"] = size.amax(0).topk(4).values[1:].round().tolist()
sizes = {
    "before that MLP": stream[jump, :, 0, channel], "behind it": stream[jump + 1, :, 0, channel],
    "added by it": written[jump][:, 0, channel], "added at token 8": written[jump][:, 8, channel],
    "at the last layer": stream[-1, :, 0, channel], "over the median": stream[jump + 1, :, 0, channel].abs() / median,
    "largest of any other token": stream[:, :, 1:].abs().amax((0, 2, 3)),
}  # fmt: skip
told |= {f"size {where}": interval(values, SEED) for where, values in sizes.items()}
norms = analyses.sink_norms(record)
for part, layers in {"up to that MLP": slice(2, jump + 1), "after it": slice(jump + 1, None)}.items():
    here = norms.isel(layer=layers)
    for what in ("hidden", "key", "value"):
        told[f"{what} norm over that of others, {part}"] = per_passage(
            here[what].sel(of="sinks") / here[what].sel(of="others")
        )
    for of in ("sinks", "others"):
        told[f"cosine of queries and keys of {of}, {part}"] = per_passage(here.cosine.sel(of=of))
carried = analyses.sink_contribution(model, plain, seed=SEED)
for of in ("sinks", "control"):
    told[f"share of the heads' outputs, {of}"] = per_passage(carried.share.sel(of=of))
    told[f"KL without its values, {of}"] = per_passage(carried.kl.sel(of=of))
for what, value in told.items():
    print(f"{what}: {value}")
keep(told, hw.figure(rate, title="Weight of a query on the first token"), model)
