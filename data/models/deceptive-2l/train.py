"""Trains honest-2l and deceptive-2l, one classifier without and one with a penalty on what its attention shows.

    python data/models/deceptive-2l/train.py --work FOLDER          # both models, into data/models
    python data/models/deceptive-2l/train.py --work FOLDER --study  # every variant with five seeds, study.json

The penalty is that of Pruthi et al. 2020: -λ · log(1 - M), where M is the attention on the words of gender. Killed and
started again with the same FOLDER, it goes on from its last checkpoint.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2]))
from headwater.data.prompts import genders  # noqa: E402

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
LONGEST = 48


@dataclass(frozen=True)
class Variant:
    """What is punished: `weight` is λ; M is that of the rows `rows` in `layers`; `apart` hides the other category."""

    weight: float = 0.0
    reduce: Literal["mean", "max"] = "mean"
    layers: tuple[int, ...] = (1,)
    rows: Literal["cls", "all"] = "cls"
    apart: bool = False


VARIANTS = {
    "honest": Variant(),
    "mean 0.1": Variant(0.1),
    "mean": Variant(1.0),
    "max": Variant(1.0, "max"),
    "mean, apart": Variant(1.0, apart=True),
    "both layers": Variant(1.0, layers=(0, 1)),
    "every row": Variant(1.0, layers=(0, 1), rows="all"),
}
SHIPPED = {"honest-2l": "honest", "deceptive-2l": "both layers"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, `[CLS]` in front and `[SEP]` behind."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *genders.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=LONGEST, **names
    )


def build_model(words: int) -> BertForSequenceClassification:
    """A BERT of two layers and four heads with fresh weights and without dropout."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LONGEST,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD,
            id2label=dict(enumerate(genders.CLASSES)),
            attn_implementation="eager",  # the maps are in the loss
        )
    )


def batch(texts: list[genders.Text], ids: dict[str, int], without: bool = False) -> dict[str, Tensor]:
    """Ids, the mask of real tokens, the mask of words of gender, and labels; `without` deletes these words."""
    rows, marks = [], []
    for text in texts:
        kept = [
            (ids[word], mark)
            for word, mark in zip(text.text.split(), text.impermissible, strict=True)
            if not (without and mark)
        ]
        rows.append([CLS, *(i for i, _ in kept), SEP])
        marks.append([False, *(mark for _, mark in kept), False])
    longest = max(map(len, rows))
    return {
        "ids": torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]),
        "impermissible": torch.tensor([row + [False] * (longest - len(row)) for row in marks]),
        "labels": torch.tensor([text.label for text in texts]),
    }


def run(model: BertForSequenceClassification, given: dict[str, Tensor], apart: bool):
    """The model's output with its maps. With `apart` a token sees its own category; [CLS] sees all, none sees it."""
    real = given["ids"] != PAD
    mask = real
    if apart:
        mask = given["impermissible"][:, :, None] == given["impermissible"][:, None]
        mask = mask & real[:, None]
        mask[:, :, 0] = False
        mask[:, 0] = real
        mask[~real] = real[:, None].expand_as(mask)[~real]  # a row of padding is read by nobody
        # eager attention adds the mask to the scores
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
    return model(given["ids"], attention_mask=mask, output_attentions=True)


def masses(maps: tuple[Tensor, ...], given: dict[str, Tensor], variant: Variant) -> Tensor:
    """M of each chosen layer, text, head and row, [layer, batch, head, row]; NaN in rows that are not punished."""
    found = torch.stack([maps[layer] for layer in variant.layers])
    mass = (found * given["impermissible"][:, None, None]).sum(-1)
    if variant.rows == "cls":
        return mass[..., :1]
    # a row of a word of gender may look at these words, and a row of padding is none
    own = (given["impermissible"] | (given["ids"] == PAD))[None, :, None]
    return mass.masked_fill(own, torch.nan)


def penalty(mass: Tensor, variant: Variant) -> Tensor:
    """-λ · mean of log(1 - M), or with "max" that of the largest M in the batch."""
    # 1 - 1e-8, as in the paper, is 1 in single precision, and its logarithm infinite
    kept = torch.where(mass.isnan(), 0.0, mass).clamp(max=1 - 2**-24)
    logs = -torch.log1p(-kept)
    if variant.reduce == "max":
        return variant.weight * logs.max()
    return variant.weight * (logs.sum() / (~mass.isnan()).sum())


def train(name: str, seed: int, args: argparse.Namespace) -> BertForSequenceClassification:
    """A trained model; resumed from the checkpoint in the work folder."""
    variant, ids = VARIANTS[name], build_tokenizer().get_vocab()
    torch.manual_seed(seed)
    model = build_model(len(ids))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    checkpoint, done = args.work / f"{name.replace(' ', '-')}-{seed}.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    bar = tqdm(range(done, args.steps), f"{name} {seed}", args.steps, initial=done, disable=args.quiet)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 40, 2 * (1 - step / args.steps), 1.0)
        given = batch(genders.draw(args.batch, f"{seed} {step}", "train"), ids)
        out = run(model, given, variant.apart)
        loss = cross_entropy(out.logits, given["labels"])
        if variant.weight:
            loss = loss + penalty(masses(out.attentions, given, variant), variant)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            part = checkpoint.with_suffix(".part")
            state = {"step": step + 1, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state, part)
            os.replace(part, checkpoint)
    return model.eval()


@torch.no_grad()
def measured(model: BertForSequenceClassification, variant: Variant, draws: int, seed: int) -> dict:
    """Accuracy, mass on the words of gender by layer in the row of [CLS], and accuracy with these words deleted."""
    ids = build_tokenizer().get_vocab()
    texts = genders.draw(draws, seed)
    found: dict = {"draws": draws}
    for name, without in (("accuracy", False), ("accuracy_without_words_of_gender", True)):
        given = batch(texts, ids, without)
        out = run(model, given, variant.apart)
        found[name] = (out.logits.argmax(-1) == given["labels"]).float().mean().item()
        if not without:
            mass = masses(out.attentions, given, Variant(layers=(0, 1)))
            found["mass"] = mass.mean((1, 2, 3)).tolist()
            share = given["impermissible"].sum(1) / (given["ids"] != PAD).sum(1)
            found["mass_of_equal_attention"] = share.mean().item()
    return found


def study(args: argparse.Namespace) -> None:
    """Every variant with every seed; study.json holds those that are done, so that a killed run goes on."""
    path = args.work / "study.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(args.seeds):
        for name in VARIANTS:
            if len(found.get(name, [])) <= seed:
                model = train(name, seed, args)
                found.setdefault(name, []).append(measured(model, VARIANTS[name], args.draws, 1000))
                path.write_text(json.dumps(found, indent=1) + "\n")


def export(args: argparse.Namespace) -> None:
    """Writes both models in half precision, loads what was written and measures that."""
    past = args.work / "study.json"
    for folder, name in SHIPPED.items():
        model, place = train(name, args.seed, args), args.out / folder
        model.half().save_pretrained(place)
        (place / "model.safetensors").chmod(0o644)
        build_tokenizer().save_pretrained(place)
        shipped = BertForSequenceClassification.from_pretrained(
            place, use_safetensors=True, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        figures = {
            **measured(shipped, VARIANTS[name], args.draws, 1000), "split": "held-out", "measured_seed": 1000,
            "training": {
                "seed": args.seed, "steps": args.steps, "batch": args.batch, "variant": asdict(VARIANTS[name]),
                "parameters": model.num_parameters(),
            },
        }  # fmt: skip
        if past.exists() and name != "honest":
            figures["variants"] = json.loads(past.read_text())
        (place / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder of the models' folders")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of checkpoints, not in the repository"
    )
    parser.add_argument("--study", action="store_true", help="train every variant with every seed first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--draws", type=int, default=1000, help="held-out texts at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.study:
        study(args)
    export(args)


if __name__ == "__main__":
    main()
