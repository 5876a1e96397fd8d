"""Prompt sets: pairs of a clean and a corrupt prompt of equal token length, each with an answer of one token.

Without a tokenizer a set holds the prompts on which the embedded task model was tested, held out from its training.
With a tokenizer the texts are drawn from words that are one token each in the middle of a text, and every pair is
checked: equal token length, an answer of one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headwater.data.prompts import tasks, texts
from headwater.lens.errors import PromptError, nearest
from headwater.lens.models.opened import Opened

CONTEXT = "the"  # a word is tokenized after this one: many tokenizers split a first word otherwise
TRIES = 50  # draws per wanted example before PromptError
NAMED = 6  # how many words an error message lists


def prompt_sets(tokenizer: Any = None) -> dict[str, str]:
    """{name: description}; with a tokenizer also the sets that exist only for a tokenizer."""
    if tokenizer is None:
        return {name: _first_line(make, name) for name, make in tasks.TASKS.items()}
    return {name: _first_line(text.make, name) for name, text in texts.texts().items()}


def prompt_set(
    name: str, n: int = 64, seed: int = 0, *, model: Opened | None = None, tokenizer: Any = None,
    **words: Sequence[str] | Mapping[str, str],
) -> list[tasks.Example]:  # fmt: skip
    """`n` examples of a set, each with `prompt`, `answer`, `wrong` answers and a `corrupt` prompt of equal length.

    The same `seed` gives the same examples. Without a model, `indirect_object`, `colored_object`, `capital` and
    `repeated_tokens` are held-out prompts for the embedded task model. With `model` or `tokenizer` (a transformers
    tokenizer), these and `colored_conflict`, `greater_than` and `docstring` are drawn for that tokenizer: `prompt` and
    `corrupt` have equally many tokens, and `answer` is one token, spelled so that the tokenizer alone gives that token
    (often " Mary"; "#17", its id, where no spelling does).

    `greater_than` asks for the last two digits of a year, "from the year 1732 to the year 17" → 33 to 99. A tokenizer
    that writes each digit as a token gets the decade instead: 4 to 9 are right, 0 to 2 wrong, and 3, which holds years
    on both sides, is neither. An example's `template` says which ("17" or "17, decade"); `hw.years_measure` reads both.

    Words that the tokenizer splits or does not know are left out. `words` replaces a set's own words: `names=`
    (indirect_object), `colors=` and `objects=` (coloured objects), `capitals={"France": "Paris", …}` (capital),
    `words=` (repeated_tokens, greater_than, docstring), `years=["1732", …]` (greater_than). PromptError lists the
    given words that are not one token.

    >>> import headwater as hw
    >>> example = hw.prompt_set("capital", n=1)[0]
    >>> example.prompt, example.answer
    ('The capital city of Russia is', 'Moscow')
    """
    if n < 1:
        raise PromptError(f"a prompt set needs at least one example; got n={n}")
    known = texts.texts()
    if name not in known:
        raise PromptError(f"unknown prompt set {name!r}: {nearest(name, known)}")
    if model is not None:
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise PromptError(f"{model.name} was loaded without a tokenizer; give prompt_set(tokenizer=…)")
    if tokenizer is not None:
        return _drawn(tokenizer, name, known[name], n, seed, words)
    if words or name not in tasks.TASKS:
        what = f"{next(iter(words))}=" if words else name
        raise PromptError(f"{what} is for a tokenizer's own words; give prompt_set(…, model=model) too")
    return tasks.draw(name, n, seed)


def token_of(tokenizer: Any, text: str, word: str) -> int | None:
    """The one token that `word` adds to `text`; None where it adds several, changes those before, or is unknown."""
    before, after = _ids(tokenizer, text), _ids(tokenizer, text + word)
    if len(after) != len(before) + 1 or after[:-1] != before:
        return None
    return None if after[-1] == getattr(tokenizer, "unk_token_id", None) else after[-1]


def year_tokens(tokenizer: Any, example: texts.YearExample) -> tuple[list[int], list[int]]:
    """The answer tokens of a greater-than example: right (years above the start) and wrong (up to the start)."""
    right, wrong = (
        [token for end in ends if (token := token_of(tokenizer, example.prompt, end)) is not None]
        for ends in example.sides
    )
    return right, wrong


def _drawn(
    tokenizer: Any, name: str, text: texts.PromptText, n: int, seed: int, words: Mapping[str, Any]
) -> list[tasks.Example]:
    text = _form(tokenizer, text, words)
    pools = _pools(tokenizer, name, text, words)
    rng = random.Random(f"{name} {seed}")
    found: list[tasks.Example] = []
    for _ in range(TRIES * n):
        example = _fitting(tokenizer, text.make(rng, pools))
        if example is not None:
            found.append(example)
        if len(found) == n:
            return found
    raise PromptError(
        f"{name}: only {len(found)} of {TRIES * n} draws have equally many tokens and an answer of one; the "
        f"tokenizer joins words with what stands around them, so give other words, {next(iter(pools))}=[…]"
    )


def _form(tokenizer: Any, text: texts.PromptText, given: Mapping[str, Any]) -> texts.PromptText:
    """Greater-than by decade where the tokenizer takes no year by its last two digits; otherwise `text`."""
    years = given.get("years", text.pools.get("years", ()))
    if not years or _centuries(_fit_years(tokenizer, years, 2), 2):
        return text
    return text.by_decade() if _centuries(_fit_years(tokenizer, years, 1), 1) else text


def _pools(
    tokenizer: Any, name: str, text: texts.PromptText, given: Mapping[str, Any]
) -> dict[str, Sequence[str]]:
    """The words of a set by pool, only those that are one token; PromptError lists the given words that are not."""
    takes = [pool for pool in text.pools if pool != "countries"]
    wrong = [pool for pool in given if pool not in takes]
    if wrong:
        raise PromptError(f"{name} has no {', '.join(wrong)}; its words are given as {', '.join(takes)}=")
    pools = dict(text.pools) | {pool: tuple(value) for pool, value in given.items() if pool != "capitals"}
    if "capitals" in given:
        if not isinstance(given["capitals"], Mapping):
            raise PromptError('capitals are given by country, as {"France": "Paris"}')
        pools["countries"], pools["capitals"] = tuple(given["capitals"]), tuple(given["capitals"].values())
    if name == "capital":
        both = list(zip(pools["countries"], pools["capitals"], strict=True))
        fit = set(_fit(tokenizer, pools["countries"])), set(_fit(tokenizer, pools["capitals"]))
        kept = [pair for pair in both if pair[0] in fit[0] and pair[1] in fit[1]]
        lost = [f"{c} – {town}" for c, town in both if (c, town) not in kept]
        _refuse("capital", "capitals", lost, len(kept), text.least["capitals"], "capitals" in given)
        return {"countries": [c for c, _ in kept], "capitals": [town for _, town in kept]}
    for pool, every in pools.items():
        kept = _fit_years(tokenizer, every, text.digits) if pool == "years" else _fit(tokenizer, every)
        lost = [word for word in every if word not in set(kept)]
        usable = len(kept)
        if pool == "years" and not _centuries(kept, text.digits):
            usable = 0
        _refuse(name, pool, lost, usable, text.least[pool], pool in given)
        pools[pool] = kept
    return pools


def _centuries(years: Sequence[str], digits: int) -> list[str]:
    """The centuries from whose years an example can be drawn."""
    return [
        century for century in sorted({year[:2] for year in years})
        if texts.starts([year[2:] for year in years if year[:2] == century], digits)
    ]  # fmt: skip


def _refuse(name: str, pool: str, lost: Sequence[str], left: int, least: int, own: bool) -> None:
    if left >= least and not (own and lost):
        return
    spelled = ", ".join(lost[:NAMED]) + (f" and {len(lost) - NAMED} more" if len(lost) > NAMED else "")
    what = f"the tokenizer splits or does not know {spelled}" if lost else "there are too few"
    mend = "leave these out of" if own and lost and left >= least else "give your own,"
    hint = ' of years such as 17|32, with "01" among them,' if pool == "years" else ""
    raise PromptError(f"{name}: {what}; {left}{hint} are left and {least} are needed: {mend} {pool}=")


def _fit(tokenizer: Any, words: Iterable[str]) -> list[str]:
    """The words that are one token after another word; of words with the same token, the first."""
    found: dict[int, str] = {}
    for word in words:
        token = token_of(tokenizer, CONTEXT, f" {word}")
        if token is not None:
            found.setdefault(token, word)
    return list(found.values())


def _fit_years(tokenizer: Any, years: Iterable[str], digits: int) -> list[str]:
    """The years of which the last two digits, or the first of these, are one token after the first two digits."""
    return [
        year for year in years
        if len(year) == 4 and year.isdigit()
        and token_of(tokenizer, f"{CONTEXT} year {year[:2]}", year[2 : 2 + digits]) is not None
    ]  # fmt: skip


def _fitting(tokenizer: Any, example: tasks.Example) -> tasks.Example | None:
    """The example with its answers spelled for the tokenizer; None if lengths differ or an answer is several tokens."""
    gap = "" if isinstance(example, texts.YearExample) else " "
    words = [example.answer, *example.wrong]
    words += [] if example.corrupt_answer is None else [example.corrupt_answer]
    spelled = [_spelled(tokenizer, example.prompt, gap, word) for word in words]
    if len(_ids(tokenizer, example.prompt)) != len(_ids(tokenizer, example.corrupt)):
        return None
    if None in spelled or example.prompt == example.corrupt:
        return None
    answer, *rest = [word for word in spelled if word is not None]
    other = None if example.corrupt_answer is None else rest.pop()
    return replace(example, answer=answer, wrong=tuple(rest), corrupt_answer=other)


def _spelled(tokenizer: Any, text: str, gap: str, word: str) -> str | None:
    """A spelling of `word` that alone gives the token with which it continues the text; "#id" where none does."""
    token = token_of(tokenizer, text, gap + word)
    if token is None:
        return None
    forms = (f" {word}", word)
    return next((form for form in forms if _ids(tokenizer, form) == [token]), f"#{token}")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_line(make: Any, name: str) -> str:
    return (make.__doc__ or name).strip().splitlines()[0]
