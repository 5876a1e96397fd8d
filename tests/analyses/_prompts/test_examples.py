"""What an analysis takes as its examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headwater as hw
from headwater.analyses._prompts.examples import batches_of, outputs_of
from headwater.analyses._prompts.texts import Texts
from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.loading import zoo
from headwater.lens.naming.tokens import Tokens


@pytest.mark.parametrize("given", [object(), torch.tensor(3), iter(["a text"]), {}, ()])
def test_what_is_no_list_of_texts_is_one_line(given: object) -> None:
    with pytest.raises(HeadwaterError) as caught:
        batches_of(hw.load("tasks-4l"), given, 4)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def both_sides() -> tuple[hw.HookedModel, Any]:
    """T5 with three examples: lengths (5, 3), (4, 3) and (5, 3) of encoder and decoder, with padding between."""
    given = zoo.inputs("t5", lengths=(5, 4, 5))
    given["decoder_attention_mask"] = torch.ones(3, 7).long()
    given["decoder_attention_mask"][:, 3:] = 0
    model = hw.load(zoo.build("t5"))
    return model, model.to_tokens(**given)


def test_rows_of_a_batch_are_equally_long_on_every_axis() -> None:
    """A batch gives what each example gives alone, by transformers itself."""
    model, tokens = both_sides()
    batches = batches_of(model, tokens, 4)
    assert [batch.places for batch in batches] == [[1], [0, 2]]
    for batch in batches:
        ids = batch.ids.more["input_ids"]
        assert batch.ids.shape[1] == 3
        assert ids.shape[1] == {1: 4, 0: 5}[batch.places[0]]
        for row, place in enumerate(batch.places):
            alone = model.hf(
                input_ids=tokens.more["input_ids"][place : place + 1, : ids.shape[1]],
                decoder_input_ids=tokens.ids[place : place + 1, :3],
            )
            torch.testing.assert_close(model(batch.ids)[row], alone.logits[0], atol=1e-5, rtol=1e-4)


def test_labels_and_pictures_stay_with_their_example() -> None:
    model = hw.load(zoo.build("llava"))
    given = zoo.inputs("llava", lengths=(9, 7, 9))
    tokens = model.to_tokens(given.pop("input_ids"), given.pop("attention_mask"), **given)
    labelled = Tokens(tokens.ids, tokens.mask, tokens.more, torch.where(tokens.mask, tokens.ids, -100))
    for batch in batches_of(model, labelled, 4):
        assert torch.equal(batch.ids.labels, batch.ids.ids)
        assert torch.equal(batch.ids.more["pixel_values"], given["pixel_values"][batch.places])
        twice = batch.copies(2)
        assert twice.places == batch.places * 2
        torch.testing.assert_close(model(twice.ids)[len(batch.places) :], model(batch.ids))


def test_two_towers_take_pairs_alone() -> None:
    model = hw.load(zoo.build("clip"))
    given = zoo.inputs("clip", lengths=(9, 7))
    tokens = model.to_tokens(given["input_ids"], given["attention_mask"], pixel_values=given["pixel_values"])
    for batch in batches_of(model, tokens, 1):
        out = model.hf(
            input_ids=given["input_ids"][batch.places][:, : batch.ids.shape[1]],
            pixel_values=given["pixel_values"][batch.places],
        )
        expected = out.logits_per_image / model.hf.logit_scale.exp()
        torch.testing.assert_close(outputs_of(model)(batch.ids), expected[:, 0], atol=1e-5, rtol=1e-4)
    few = model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"][:1])
    with pytest.raises(AnalysisError, match="2 texts and 1 of pixel_values; give as many"):
        batches_of(model, few, 4)


def test_texts_are_the_tokens_of_the_part() -> None:
    model, tokens = both_sides()
    for name, queries, keys in (("decoder", 7, 7), ("encoder", 5, 5), ("cross", 7, 5)):
        texts = Texts.of(model.part(name), tokens, 4)
        record = model.part(name).record(tokens)
        assert texts.valid.shape == (3, queries)
        assert texts.keys.valid.shape == (3, keys)
        assert torch.equal(texts.valid, record.valid)
        assert texts.keys.strings == (record.strings if record.keys is None else record.keys.strings)
        assert [texts.length(batch) for batch in texts.batches] == ([4, 5] if name == "encoder" else [3, 3])
    clip = hw.load(zoo.build("clip"))
    given = zoo.inputs("clip")
    tower = Texts.of(
        clip.part("vision"), clip.to_tokens(given["input_ids"], pixel_values=given["pixel_values"]), 4
    )
    assert tower.strings[0][:2] == ["[CLS]", "0,0"]
