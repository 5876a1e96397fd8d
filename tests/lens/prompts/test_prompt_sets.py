"""Prompt sets for any tokenizer: equal lengths, one-token answers, what differs, refusals by name; measures of sets.

Real tokenizers of three kinds, of which two are trained here on texts in which some names are frequent and others never
occur, so that some are one token and some split; years fall into pairs of digits. Mutations seen to fail: words that
split taken along, a year equal to the start counted as larger, all pairs measured by the first one's sets, clean and
corrupted exchanged, another argument asked for.
"""

from __future__ import annotations

import re
import zlib
from functools import cache
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import headwater as hw
from headwater import analyses
from headwater.data.prompts import tasks, texts
from headwater.data.prompts.words import ARGUMENTS, CAPITALS, COLORS, EVENTS, NAMES, OBJECTS
from headwater.lens.errors import HeadwaterError, PromptError
from headwater.lens.prompts.prompt_sets import prompt_set, prompt_sets, token_of, year_tokens
from headwater.lens.prompts.token_sets import sets_measure, years_measure

RARE = {"Isabel", "Quinn", "Fiona", "Copenhagen", "keychain", "dynasty", "parent"}
FIRST = (  # of the held-out draws that the embedded model's published accuracies were measured on
    "Q : On the desk , I see a brown stick , a green jug , and a white lighter . What color is the stick ? A : brown "
    "Q : On the floor , I see a white necklace , a silver keychain , and a red sheet . What color is the necklace ? A :"
)
SETS = tuple(texts.texts())
KINDS = ("bpe", "metaspace", "wordpiece")
PAIRS = [f"{n:02}" for n in range(100)]
WORDS = [*NAMES, *CAPITALS, *CAPITALS.values(), *COLORS, *OBJECTS, *EVENTS, *ARGUMENTS, *tasks.vocabulary()]


def corpus() -> list[str]:
    """Every word but the rare ones often behind another, and every pair of digits."""
    lines = [f"the {word} and the {word}, {word}." for word in WORDS if word.isalpha() and word not in RARE]
    return lines * 3 + [f"the {pair}{pair}" for pair in PAIRS] * 30


@cache
def made(kind: str) -> Any:
    options: dict[str, Any] = {"special_tokens": ["<unk>", "<bos>"], "show_progress": False}
    if kind == "bpe":  # as GPT-2 has it
        inner = tokenizers.Tokenizer(models.BPE())
        twos = pre_tokenizers.Split(tokenizers.Regex(r" ?\d\d"), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [twos, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=1700, initial_alphabet=alphabet, **options)
    elif kind == "wordpiece":  # as BERT has it, in lower case
        inner = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=1400, **options)
    else:  # as SentencePiece has it, whole words likelier than their letters
        known = sorted({word for word in WORDS if word not in RARE})
        letters = sorted({letter for word in WORDS for letter in word} | set('▁0123456789()":_\n'))
        parts = [f"▁{c}" for c in texts.CENTURIES] + PAIRS
        pieces = [("<unk>", 0.0), ("<bos>", 0.0)] + [(f"▁{word}", -5.0) for word in known if len(word) > 1]
        pieces += [(part, -6.0) for part in parts] + [(letter, -9.0) for letter in letters]
        inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        trainer = None
    if trainer is not None:
        inner.train_from_iterator(corpus(), trainer)
    if kind == "wordpiece":  # with years as "17" and "##32"
        vocabulary = [word for word in inner.get_vocab() if not any(sign.isdigit() for sign in word)]
        vocabulary += [*texts.CENTURIES, *(f"##{pair}" for pair in PAIRS)]
        inner.model = models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>")
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>")


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_pairs_keep_their_promise(kind: str, name: str) -> None:
    tokenizer = made(kind)
    drawn = prompt_set(name, 30, 3, tokenizer=tokenizer)
    assert len(drawn) == 30
    for example in drawn:
        clean, corrupted = ids(tokenizer, example.prompt), ids(tokenizer, example.corrupted)
        assert len(clean) == len(corrupted)
        assert clean != corrupted
        token = token_of_answer(tokenizer, example.answer)
        assert tokenizer.unk_token_id not in [token, *clean[1:]] or kind == "wordpiece"
        words = example.answer.strip() if not example.answer.startswith("#") else None
        gap = "" if name == "greater_than" else " "
        if words is not None:
            assert ids(tokenizer, example.prompt + gap + words) == [*clean, token]
        assert all(token_of_answer(tokenizer, wrong) != token for wrong in example.wrong)
    assert prompt_set(name, 30, 3, tokenizer=tokenizer) == drawn
    assert prompt_set(name, 30, 4, tokenizer=tokenizer) != drawn
    assert prompt_set(name, 5, 3, tokenizer=tokenizer) == drawn[:5]


def token_of_answer(tokenizer: Any, answer: str) -> int:
    if answer.startswith("#"):
        return int(answer[1:])
    (token,) = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return token


@pytest.mark.parametrize("kind", KINDS)
def test_some_names_split_and_are_left_out(kind: str) -> None:
    tokenizer = made(kind)
    assert len(pieces(tokenizer, "the Isabel")) > 2
    assert len(pieces(tokenizer, "the Mary")) == 2
    said = " ".join(e.prompt for e in prompt_set("indirect_object", 200, tokenizer=tokenizer))
    assert not re.search(r"\b(Isabel|Quinn|Fiona)\b", said)
    assert sum(name in said for name in NAMES) > 50


def test_what_differs_differs_where_it_should() -> None:
    tokenizer = made("bpe")
    orders = []
    for example in prompt_set("indirect_object", 60, tokenizer=tokenizer):
        clean, corrupted = example.prompt.split(), example.corrupted.split()
        (place,) = [n for n, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]
        answer, subject = example.answer.strip(), example.wrong[0].strip()
        assert (clean[place], corrupted[place]) == (subject, answer)
        assert sum(word.strip(",.") == subject for word in clean) == 2
        assert sum(word.strip(",.") == answer for word in clean) == 1
        assert example.corrupted_answer == example.wrong[0]
        first = min(clean.index(word) for word in clean if word.strip(",.") in (answer, subject))
        order = "ABBA" if clean[first].strip(",.") == answer else "BABA"
        assert example.template.startswith(order)
        orders.append(order)
    assert 15 < orders.count("ABBA") < 45
    for example in prompt_set("docstring", 20, tokenizer=tokenizer):
        inside = re.search(r"\(self, (.*)\)", example.prompt)
        other = re.search(r"\(self, (.*)\)", example.corrupted)
        assert inside
        assert other
        mine, theirs = inside[1].split(", "), other[1].split(", ")
        assert not set(mine) & set(theirs)
        assert mine[2] == example.answer.strip()
        assert theirs[2] == (example.corrupted_answer or "").strip()
        assert re.findall(r":param (\w+):", example.prompt) == mine[:2]
    for example in prompt_set("repeated_tokens", 20, tokenizer=tokenizer):
        words, others = example.prompt.split(), example.corrupted.split()
        first = words.index(words[-1])  # its first copy
        assert words[first + 1] == example.answer.strip()
        assert example.answer.strip() not in others[: first + 2]
    for example in prompt_set("colored_object", 20, tokenizer=tokenizer):
        asked = re.findall(r"color is the (\w+)\? A:$", example.prompt)[0]
        assert re.search(rf"{example.answer.strip()} {asked}\b", example.prompt)
    for example in prompt_set("capital", 20, tokenizer=tokenizer):
        country = next(word for word in re.findall(r"\w+", example.prompt) if word in CAPITALS)
        assert CAPITALS[country] == example.answer.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_years(kind: str) -> None:
    tokenizer = made(kind)
    for example in prompt_set("greater_than", 20, tokenizer=tokenizer):
        assert isinstance(example, texts.YearExample)
        c, start = example.century, example.start
        assert re.search(rf"from the year {c}{start} to the year {c}$", example.prompt)
        assert example.corrupted == example.prompt.replace(f"{c}{start}", f"{c}01")
        assert start > "01"
        right, wrong = year_tokens(tokenizer, example)
        read = {tokenizer.convert_ids_to_tokens([n])[0].removeprefix("##") for n in right}
        assert read == {end for end in example.ends if int(end) > int(start)}
        assert len(right) + len(wrong) == len(example.ends) > 90
        assert token_of_answer(tokenizer, example.answer) in right


def test_measures_of_sets_in_closed_form() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits[:, -1].exp() / logits[:, -1].exp().sum(-1, keepdim=True)
    found = sets_measure([[1, 2], [3]], [[0], [4, 5]])(logits)
    expected = torch.stack([p[0, 1] + p[0, 2] - p[0, 0], p[1, 3] - p[1, 4] - p[1, 5]])
    torch.testing.assert_close(found, expected)
    row = logits[:, 0]
    shared = sets_measure([[1, 2]], [[0]], kind="logit", position=0)(logits)
    torch.testing.assert_close(shared, (row[:, 1] + row[:, 2]) / 2 - row[:, 0])
    for bad, message in (
        (([[1]], []), "1 right and 0 wrong"), (([[]], [[1]]), "set 0 holds no token"),
    ):  # fmt: skip
        with pytest.raises(PromptError, match=message):
            sets_measure(*bad)
    with pytest.raises(PromptError, match="kind='nats'"):
        sets_measure([[1]], [[2]], "nats")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"sets for 3 pairs and got 2; .* batch_size=3"):
        sets_measure([[1]] * 3, [[2]] * 3)(logits)
    with pytest.raises(PromptError, match="greater_than"):
        years_measure(prompt_set("capital", 2), None)


def test_a_measure_of_years_is_patched_and_attributed() -> None:
    """On a random model: the measure reaches every analysis of pairs, and patching everything moves it all the way."""
    tokenizer = made("bpe")
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = hw.load(hf.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    drawn = prompt_set("greater_than", 4, model=model)
    measure = years_measure(drawn, tokenizer)
    value = measure(model([e.prompt for e in drawn]))
    for n, example in enumerate(drawn):
        right, wrong = year_tokens(tokenizer, example)
        p = model([example.prompt])[0, -1].double().softmax(-1)
        assert float(value[n]) == pytest.approx(float(p[right].sum() - p[wrong].sum()), abs=1e-6)
    clean, corrupted = [e.prompt for e in drawn], [e.corrupted for e in drawn]
    found = analyses.patch(model, clean, corrupted, measure, what="residual", layers=[0])
    assert found.sizes["batch"] == 4
    torch.testing.assert_close(torch.tensor(found.clean.values), value.double(), atol=1e-6, rtol=1e-4)
    graph = analyses.edge_attribution(model, drawn, measure, steps=1)
    assert any(score for *_, score in graph.edges(data="score"))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("indirect_object", {"names": ["Mary", "Isabel", "John"]}, r"Isabel; 2 are left and 2 .* leave .* names="),
        ("indirect_object", {"names": ["Mary", "Isabel"]}, r"Isabel; 1 are left .* give your own, names="),
        ("capital", {"capitals": {"Denmark": "Copenhagen", "France": "Paris"}}, r"Denmark – Copenhagen; 1 are left"),
        ("capital", {"capitals": ["Paris"]}, r'as \{"France": "Paris"\}'),
        ("colored_object", {"objects": ["cup"]}, "too few; 1 are left and 6 are needed: give your own, objects="),
        ("docstring", {"names": ["load"]}, "docstring has no names; its words are given as words="),
        ("greater_than", {"years": ["1732", "1801"]}, "17|32"),
    ],
)  # fmt: skip
def test_words_that_split_are_refused_by_name(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        prompt_set(name, 2, tokenizer=made("bpe"), **given)
    assert "\n" not in str(caught.value)


def test_own_words_are_drawn_from() -> None:
    tokenizer = made("metaspace")
    for example in prompt_set("indirect_object", 10, tokenizer=tokenizer, names=["lamp", "cup", "jug"]):
        assert {example.answer.strip(), example.wrong[0].strip()} < {"lamp", "cup", "jug"}
    drawn = prompt_set("greater_than", 5, tokenizer=tokenizer, years=[f"15{n:02}" for n in range(1, 20)])
    assert all(isinstance(e, texts.YearExample) and e.century == "15" and e.start < "19" for e in drawn)


def test_a_tokenizer_that_writes_no_such_years_is_refused() -> None:
    model = hw.load("tasks-4l")
    with pytest.raises(PromptError, match=r"greater_than: .* war, conflict, .* and 19 more; 0 are left"):
        prompt_set("greater_than", model=model)
    with pytest.raises(
        PromptError, match=r"1100, 1101, .* 0 of years such as 17\|32, .* give your own, years="
    ):
        prompt_set("greater_than", model=model, words=["book"])


def test_a_tokenizer_that_joins_words_is_refused() -> None:
    """Every word is one token behind "the" alone, and never behind the words of a prompt."""

    def joining(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        head, _, tail = text.partition("the ")
        return {"input_ids": [1, zlib.crc32(tail.encode()) + 2] if not head and tail else [1]}

    with pytest.raises(PromptError, match="only 0 of 100 draws"):
        prompt_set("indirect_object", 2, tokenizer=joining)


def test_the_embedded_model_and_its_own_draws() -> None:
    """Without a model the held-out draws are what they always were; with it words are spelled naturally."""
    assert prompt_set("indirect_object", 5, 7) == tasks.draw("indirect_object", 5, 7)
    assert tasks.draw("colored_object", 1, 0)[0].prompt == FIRST
    model = hw.load("tasks-4l")
    right = 0
    for name in tasks.TASKS:
        drawn = prompt_set(name, 20, model=model)
        for example in drawn:
            said = model.to_strings(model(example.prompt)[0, -1:].argmax(-1))[0]
            right += said.strip() == example.answer.strip()
    assert right >= 76
    assert set(prompt_sets()) == set(tasks.TASKS)
    assert set(prompt_sets(model.tokenizer)) == set(SETS)
    assert all(prompt_sets(model.tokenizer).values())
    assert token_of(model.tokenizer, "the", " Mary") is not None
    for arguments, message in (
        ({"name": "indirect_objects"}, "did you mean 'indirect_object'"),
        ({"name": "greater_than"}, "greater_than is for a tokenizer's own words"),
        ({"name": "capital", "names": ["a"]}, "names= is for"), ({"name": "capital", "n": 0}, "n=0"),
    ):  # fmt: skip
        with pytest.raises(HeadwaterError, match=message):
            prompt_set(**arguments)
