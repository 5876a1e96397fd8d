"""Prompt sets for any tokenizer: equal lengths, one-token answers, what differs, refusals by name.

Real tokenizers of three kinds, of which two are trained here on texts in which some names are frequent and others never
occur, so that some are one token and some split; years fall into pairs of digits. Mutations seen to fail: words that
split taken along, clean and corrupt exchanged, another argument asked for.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import pytest
from trained_tokenizers import made, pieces

import headwater as hw
from headwater.data.prompts import tasks, texts
from headwater.data.prompts.words import CAPITALS, NAMES
from headwater.lens.errors import HeadwaterError, PromptError
from headwater.lens.prompts.prompt_sets import prompt_set, prompt_sets, token_of, year_tokens

FIRST = (  # of the held-out draws that the embedded model's published accuracies were measured on
    "Q : On the desk , I see a brown stick , a green jug , and a white lighter . What color is the stick ? A : brown "
    "Q : On the floor , I see a white necklace , a silver keychain , and a red sheet . What color is the necklace ? A :"
)


SETS = tuple(texts.texts())


KINDS = ("bpe", "metaspace", "wordpiece")


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_pairs_keep_their_promise(kind: str, name: str) -> None:
    tokenizer = made(kind)
    drawn = prompt_set(name, 30, 3, tokenizer=tokenizer)
    assert len(drawn) == 30
    for example in drawn:
        clean, corrupt = ids(tokenizer, example.prompt), ids(tokenizer, example.corrupt)
        assert len(clean) == len(corrupt)
        assert clean != corrupt
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
        clean, corrupt = example.prompt.split(), example.corrupt.split()
        (place,) = [n for n, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        answer, subject = example.answer.strip(), example.wrong[0].strip()
        assert (clean[place], corrupt[place]) == (subject, answer)
        assert sum(word.strip(",.") == subject for word in clean) == 2
        assert sum(word.strip(",.") == answer for word in clean) == 1
        assert example.corrupt_answer == example.wrong[0]
        first = min(clean.index(word) for word in clean if word.strip(",.") in (answer, subject))
        order = "ABBA" if clean[first].strip(",.") == answer else "BABA"
        assert example.template.startswith(order)
        orders.append(order)
    assert 15 < orders.count("ABBA") < 45
    for example in prompt_set("docstring", 20, tokenizer=tokenizer):
        inside = re.search(r"\(self, (.*)\)", example.prompt)
        other = re.search(r"\(self, (.*)\)", example.corrupt)
        assert inside
        assert other
        mine, theirs = inside[1].split(", "), other[1].split(", ")
        assert not set(mine) & set(theirs)
        assert mine[2] == example.answer.strip()
        assert theirs[2] == (example.corrupt_answer or "").strip()
        assert re.findall(r":param (\w+):", example.prompt) == mine[:2]
    for example in prompt_set("repeated_tokens", 20, tokenizer=tokenizer):
        words, others = example.prompt.split(), example.corrupt.split()
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
        assert example.corrupt == example.prompt.replace(f"{c}{start}", f"{c}01")
        assert start > "01"
        right, wrong = year_tokens(tokenizer, example)
        read = {tokenizer.convert_ids_to_tokens([n])[0].removeprefix("##") for n in right}
        assert read == {end for end in example.ends if int(end) > int(start)}
        assert len(right) + len(wrong) == len(example.ends) > 90
        assert token_of_answer(tokenizer, example.answer) in right


def test_years_by_decade_where_each_digit_is_a_token() -> None:
    """Right are the decades of which every year is later, wrong those of which none is: counted year by year."""
    tokenizer = made("digits")
    assert pieces(tokenizer, "the year 1732")[-4:] == ["1", "7", "3", "2"]
    drawn = prompt_set("greater_than", 60, tokenizer=tokenizer)
    for example in drawn:
        assert isinstance(example, texts.YearExample)
        c, start = example.century, example.start
        assert example.template == f"{c}, decade"
        assert re.search(rf"from the year {c}{start} to the year {c}$", example.prompt)
        later = {digit: {10 * digit + n > int(start) for n in range(10)} for digit in range(10)}
        for side, kind in zip(year_tokens(tokenizer, example), (True, False), strict=True):
            read = {int(tokenizer.convert_ids_to_tokens([n])[0]) for n in side}
            assert read == {digit for digit, found in later.items() if found == {kind}} != set()
        right, wrong = year_tokens(tokenizer, example)
        assert token_of_answer(tokenizer, example.answer) in right
        assert token_of_answer(tokenizer, example.wrong[0]) in wrong
        assert len(ids(tokenizer, example.prompt)) == len(ids(tokenizer, example.corrupt))
    assert len({example.start for example in drawn}) > 30
    assert all("decade" not in e.template for e in prompt_set("greater_than", 5, tokenizer=made("bpe")))
    own = prompt_set("greater_than", 5, tokenizer=tokenizer, years=[f"15{n:02}" for n in range(1, 30)])
    assert {end for example in own if isinstance(example, texts.YearExample) for end in example.ends} == {
        *"012"
    }
    with pytest.raises(PromptError, match="of years such as"):
        prompt_set("greater_than", 5, tokenizer=tokenizer, years=["1532", "1540"])


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
