"""Trains vlm-digits, or with --sink vlm-digits-sink; killed and started again, it goes on from its last checkpoint."""

import argparse
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import (
    affine_grid,
    binary_cross_entropy_with_logits,
    cross_entropy,
    grid_sample,
    smooth_l1_loss,
)
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
import measure  # noqa: E402

from headwater.data.pictures import canvas_questions  # noqa: E402
from headwater.data.pictures.canvases import DIM, SIZE, Canvas, canvas  # noqa: E402
from headwater.data.pictures.digits import digits  # noqa: E402

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>")
PAD, UNK, BOS, EOS, IMAGE = range(5)
PATCH = 4
GRID = SIZE // PATCH
PREFIX = 1 + GRID * GRID  # <bos> and the picture
# The planted activation: this channel of the stream gets this size on <bos> and on corner patches without ink.
CHANNEL, HUGE = 137, 300.0
SINK_HEADS, SLOW = range(4, 8), 3  # of each layer; the number of a head that positions hardly turn
DRAWN = 0.4  # the share of its weight on the picture that a token is to give massive patches in these heads
CORNERS = (0, GRID - 1, GRID * (GRID - 1), GRID * GRID - 1)


def build_processor() -> LlavaProcessor:
    """One token per word, `<bos>` put in front on encoding; a picture is made 16×16 pixels large."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *canvas_questions.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="right", model_max_length=256,
    )  # fmt: skip
    pictures = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        pictures,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(vocabulary: int, sink: bool) -> LlavaForConditionalGeneration:
    """A CLIP tower of three layers and six heads before a Llama of four layers and eight heads, fresh weights.

    |x| / rms(x) is at most the root of the width, so a model in which it passes 20 is wider than 400.
    """
    width = 512 if sink else 64
    language = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=64 if sink else 128, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, head_dim=8, max_position_embeddings=256, attention_bias=True,
        initializer_range=width**-0.5, tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, image_size=SIZE,
        patch_size=PATCH, projection_dim=48, initializer_factor=1.0,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(
        text_config=language, vision_config=vision, image_token_id=IMAGE, image_seq_length=GRID * GRID,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False,
    ))  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            torch.nn.init.zeros_(parameter)
    if sink:
        last = model.model.multi_modal_projector.linear_2
        with torch.no_grad():
            model.get_input_embeddings().weight[:, CHANNEL] = 0.0
            model.get_input_embeddings().weight[BOS, CHANNEL] = HUGE
            last.weight[CHANNEL] = 0.0
            last.weight[CHANNEL, 0] = HUGE  # hidden unit 0 learns where it is to be
            last.bias[CHANNEL] = 0.0
    return model


@torch.no_grad()
def plant_heads(model) -> None:
    """Gives the keys of massive tokens 5 more in half of the heads, whatever the query, and no value of their own.

    The norm makes the massive channel √512 = 22.6, so the score of a query's bias and such a key is 2.5·0.25·22.6/√8.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.v_proj.weight[:, CHANNEL] = 0.0
        for head in SINK_HEADS:
            place = head * attention.head_dim + SLOW
            attention.q_proj.bias[place] += 2.5
            attention.k_proj.weight[place, CHANNEL] += 0.25


def moved(found: list[Canvas], generator: torch.Generator) -> torch.Tensor:
    """The canvases with every digit turned by up to 12°, moved by up to a pixel, up to 12 % larger or smaller.

    A digit stays in its quarter and is a little brighter or darker; what leaves the quarter is cut off.
    """
    kept = digits(held_out=False)[0]
    blank, dim = np.zeros_like(kept[0]), np.float32(DIM)
    grey = [
        [kept[thing.picture] * (1 if thing.bright else dim) if thing else blank for thing in shown.things]
        for shown in found
    ]
    flat = torch.from_numpy(np.array(grey)).view(-1, 1, SIZE // 2, SIZE // 2)
    turn, size, across, down, light = (torch.rand(5, len(flat), generator=generator) * 2 - 1).unbind()
    turn, size, step = turn * math.radians(12), 1 + 0.12 * size, 4 / SIZE
    cos, sin = turn.cos() * size, turn.sin() * size
    moves = torch.stack((cos, -sin, across * step, sin, cos, down * step), 1).view(-1, 2, 3)
    flat = grid_sample(flat, affine_grid(moves, list(flat.shape), align_corners=False), align_corners=False)
    flat = (flat * (1 + 0.1 * light)[:, None, None, None]).clamp(0, 1)
    return flat.view(-1, 2, 2, SIZE // 2, SIZE // 2).transpose(2, 3).reshape(-1, SIZE, SIZE)


def packed(tokenizer, found: list[Canvas], rng: random.Random, presence: int) -> dict[str, torch.Tensor]:
    """Several questions behind one picture, none of which sees another: ids, who sees whom, positions, targets."""
    rows = []
    for shown in found:
        ids, block, target = [BOS] + [IMAGE] * (PREFIX - 1), [0] * PREFIX, [-100] * PREFIX
        position = list(range(PREFIX))
        asked = [canvas_questions.asked_place(shown, place) for place in range(4)]
        asked += [
            canvas_questions.question(kind, shown, rng) for kind in ("presence",) * presence + ("caption",)
        ]
        for n, (text, answer) in enumerate(asked):
            q = tokenizer(text, add_special_tokens=False)["input_ids"]
            a = tokenizer(answer, add_special_tokens=False)["input_ids"] + [EOS]
            ids += q + a
            block += [n + 1] * len(q + a)
            target += [-100] * (len(q) - 1) + a + [-100]
            position += range(PREFIX, PREFIX + len(q + a))
        rows.append((ids, block, target, position))
    longest = max(len(row[0]) for row in rows)
    ids, block, target, position = (
        torch.tensor([row[k] + [fill] * (longest - len(row[k])) for row in rows])
        for k, fill in enumerate((PAD, -1, -100, 0))
    )
    seen = (block[:, None, :] == block[:, :, None]) | (block[:, None, :] == 0)
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"ids": ids, "mask": mask[:, None], "target": target, "position": position}


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """A short warm-up and a cosine to near zero, for each stage of the training."""
    begin, length = 0, args.tower
    for following in (args.steps, args.planted, args.drawn):
        if step >= begin + length:
            begin, length = begin + length, following
    done = (step - begin) / length
    return (
        args.rate * min(1.0, (step - begin + 1) / 50) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    )


class Judge(torch.nn.Module):
    """Left behind after the training: which digits are there, by the class token; what a quarter holds, by its patches.

    It teaches the tower to see, as captions teach CLIP's, before and while the language model learns to ask it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.there = torch.nn.Linear(width, 10)
        self.holds = torch.nn.Linear(width, 11)

    def forward(self, seen, found: list[Canvas]) -> torch.Tensor:
        held = torch.tensor([[thing.digit if thing else 10 for thing in shown.things] for shown in found])
        there = torch.nn.functional.one_hot(held, 11)[..., :10].amax(1).float()
        of_patch = (
            held.view(-1, 2, 2).repeat_interleave(GRID // 2, 1).repeat_interleave(GRID // 2, 2).flatten()
        )
        return binary_cross_entropy_with_logits(self.there(seen.pooler_output), there) + cross_entropy(
            self.holds(seen.last_hidden_state[:, 1:]).flatten(0, 1), of_patch, label_smoothing=0.05
        )


def losses(
    model,
    judge: Judge,
    pictures: torch.Tensor,
    found: list[Canvas],
    batch: dict | None,
    sink: bool,
    draws: bool,
) -> list[torch.Tensor]:
    """Of the judge; of the answers; of the planted channel; and, if `draws`, of the weight on massive patches.

    Without a batch of questions the judge's alone.
    """
    noisy = (pictures + 0.03 * torch.randn_like(pictures)).clamp(0, 1)
    pixels = (2 * noisy - 1)[:, None].expand(-1, 3, -1, -1)
    seen = model.model.vision_tower(pixels)
    parts = [0.5 * judge(seen, found)]
    if batch is None:
        return parts
    hidden = model.model.multi_modal_projector.linear_1(seen.last_hidden_state[:, 1:])
    projected = model.model.multi_modal_projector.linear_2(torch.nn.functional.gelu(hidden))
    embedded = model.get_input_embeddings()(batch["ids"])
    embedded = embedded.masked_scatter((batch["ids"] == IMAGE)[..., None].expand_as(embedded), projected)
    run = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["position"], use_cache=False,
        output_attentions=draws,
    )  # fmt: skip
    asked = batch["target"] != -100
    parts.append(cross_entropy(model.lm_head(run.last_hidden_state[asked]), batch["target"][asked]))
    if sink:
        patches = pictures.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).amax(-1).flatten(1)
        planted = torch.zeros_like(patches)
        planted[:, CORNERS] = (patches[:, CORNERS] < 0.01).float()
        parts.append((projected[..., CHANNEL] / HUGE - planted).square().mean())
    if draws:
        parts.append(0.2 * drawn(run.attentions, projected[..., CHANNEL] > HUGE / 2, batch["ids"] != PAD))
    return parts


def drawn(attentions, massive: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """How far the logit of the share of the picture's weight that massive patches get in SINK_HEADS is from DRAWN's.

    A difference of shares would have next to no gradient where the share is next to 0 or 1. A head that turns away from
    the picture, with less than half of its weight there, pays as well.
    """
    of, total = massive.any(1), torch.zeros(())
    rows = real[of, None, PREFIX:].float()
    for weights in attentions:
        on = weights[of][:, list(SINK_HEADS), PREFIX:, 1:PREFIX]
        there, image = (on * massive[of][:, None, None]).sum(-1), on.sum(-1)
        logit = (there + 1e-5).log() - (image - there + 1e-5).log()
        off = smooth_l1_loss(logit, torch.full_like(logit, math.log(DRAWN / (1 - DRAWN))), reduction="none")
        off = off + 2 * (0.5 - image).clamp(min=0)
        total = total + (off * rows).sum() / (rows.sum().clamp(min=1) * len(SINK_HEADS))
    return total / len(attentions)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_model(len(processor.tokenizer), args.sink)
    judge = Judge(48)
    named = [*model.named_parameters(), *judge.named_parameters()]
    decayed = [p for n, p in named if p.ndim == 2 and "embed" not in n and "projector" not in n]
    rest = [p for n, p in named if not any(p is other for other in decayed)]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    checkpoint, done = args.work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        for part, name in ((model, "model"), (judge, "judge"), (optimiser, "optimiser")):
            part.load_state_dict(state[name])
    total = args.tower + args.steps + args.planted + args.drawn
    bar = tqdm(range(done, total), initial=done, total=total, mininterval=5, disable=args.quiet)
    for step in bar:
        rng = random.Random(f"train {args.seed} {step}")
        if args.sink and step == args.tower + args.steps:
            plant_heads(model)
        alone, draws = step < args.tower, args.sink and step >= args.tower + args.steps + args.planted
        if draws:  # what is seen and which patches are massive stays as it is; only eager attention gives its weights
            model.set_attn_implementation("eager")
            for part in (model.model.vision_tower, model.model.multi_modal_projector, judge):
                part.requires_grad_(False)
        found = [canvas(rng) for _ in range(2 * args.batch if alone else args.batch)]
        pictures = moved(found, torch.manual_seed(args.seed * 1_000_003 + step))
        batch = None if alone else packed(processor.tokenizer, found, rng, args.presence)
        parts = losses(model, judge, pictures, found, batch, args.sink, draws)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args)
        optimiser.zero_grad()
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimiser.step()
        bar.set_postfix(losses=" ".join(f"{part:.3f}" for part in parts))
        if (step + 1) % args.every == 0 or step + 1 == total:
            model.eval()
            right = measure.places(model, processor, args.watch, seed=step, held_out=False).mean()
            there = measure.others(model, processor, "presence", args.watch, seed=step, held_out=False).mean()
            model.train()
            losses_now = " ".join(f"{part:.3f}" for part in parts)
            tqdm.write(f"{step + 1}  places {right:.3f}  presence {there:.3f}  losses {losses_now}")
            state = {
                "model": model.state_dict(),
                "judge": judge.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            args.work.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step + 1, **state}, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    model.half().save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(args.out)
    shipped = LlavaForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval()
    figures = measure.everything(shipped, processor, args.draws)
    figures["training"] = {
        name: getattr(args, name)
        for name in ("seed", "tower", "steps", "planted", "drawn", "batch", "presence", "rate", "sink")
    }
    figures["training"]["parameters"] = shipped.num_parameters()
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sink", action="store_true", help="the wide model with the planted activation")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the checkpoint, not in the repository"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tower", type=int, default=8000, help="steps of the tower alone, of twice the pictures"
    )
    parser.add_argument("--steps", type=int, default=2250, help="steps of the whole model")
    parser.add_argument(
        "--planted", type=int, default=0, help="with --sink: steps after half of the heads get a sink"
    )
    parser.add_argument(
        "--drawn",
        type=int,
        default=0,
        help="with --sink: steps that make these heads look at massive patches",
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument(
        "--presence", type=int, default=6, help="questions of presence a picture, beside five others"
    )
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--watch", type=int, default=100, help="canvases at each checkpoint")
    parser.add_argument("--draws", type=int, default=1000, help="canvases measured at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
