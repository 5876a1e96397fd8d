"""Where do the attention sinks of SmolLM2 lie, what makes them, and what do they carry?"""

import torch
from _kept import QUICK, interval, keep, passages, show

import headwater as hw
from headwater.analyses import sink_contribution, sink_inputs, sink_norms, sink_rate

SEED, N, LENGTH = 0, 2 if QUICK else 16, 64
model, told = hw.load("smollm2-135m"), {"passages": N, "tokens": LENGTH, "seed": SEED}
plain = passages(model, N, LENGTH, SEED)
begun = torch.cat([torch.full((N, 1), model.tokenizer.bos_token_id), plain[:, :-1]], 1)


def per_passage(values):  # mean and bounds over passages of the mean over layers and heads
    return interval(values.mean([dim for dim in values.dims if dim != "batch"]), SEED)


cut = [hw.Redistribute(keys=0, keep=0.0)]
for name, ids, edits in ("no bos", plain, []), ("bos", begun, []), ("first token cut", plain, cut):
    with model.edit(*edits):
        record = model.record(ids)
    for key in (0, 1, 8):
        share = sink_rate(record, key=key)["received_share_per_example"]
        told[f"sink rate, {name}, token {key}"] = per_passage(share > 0.3)
inputs = sink_inputs(model, plain, length=LENGTH, seed=SEED)
for kind in ("random", "repeated"):
    told[f"sink rate, {kind} tokens"] = per_passage(inputs.rate.sel(input=kind))
record = model.record(plain, keep=("qkv", "residual"))
told["share by layer"] = (rate := sink_rate(record).received_share).mean("head").round(2).values.tolist()
stream = torch.stack([record.residual(layer) for layer in record.layers])  # [layer, passage, token, channel]
size = stream[:, :, 0].abs().mean(1)
channel = int(size.amax(0).argmax())
jump = int(size[:, channel].diff().argmax())
mlp, written, behind = model.hf.model.layers[jump].mlp, [], stream[jump + 1]
hook = mlp.register_forward_hook(lambda *call: written.append(call[-1][..., channel]))
model(plain)
hook.remove()
told["massive activation: channel, layer whose MLP makes it"] = [channel, jump]
told["the next largest channels"] = size.amax(0).topk(4).values[1:].round().tolist()
told |= {f"size {where}": interval(values, SEED) for where, values in {
    "before that MLP": stream[jump, :, 0, channel], "added by it": written[0][:, 0],
    "added at token 8": written[0][:, 8], "at the last layer": stream[-1, :, 0, channel],
    "over the median": behind[:, 0, channel].abs() / behind.abs().flatten(1).median(-1).values,
}.items()}  # fmt: skip
norms = sink_norms(record)
for part, layers in {"up to that MLP": slice(2, jump + 1), "after it": slice(jump + 1, None)}.items():
    here = norms.isel(layer=layers)
    for what in ("hidden", "key", "value"):
        ratio = here[what].sel(of="sinks") / here[what].sel(of="others")
        told[f"{what} norm over that of others, {part}"] = per_passage(ratio)
    for of in ("sinks", "others"):
        told[f"cosine of queries and keys of {of}, {part}"] = per_passage(here.cosine.sel(of=of))
carried = sink_contribution(model, plain, seed=SEED)
for of in ("sinks", "control"):
    told[f"share of the heads' outputs, {of}"] = per_passage(carried.share.sel(of=of))
    told[f"KL without its values, {of}"] = per_passage(carried.kl.sel(of=of))
show(told)
keep(told, hw.figure(rate, title="Weight of a query on the first token"), model)
