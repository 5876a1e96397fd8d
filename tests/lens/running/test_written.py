"""Words behind a prompt see the pictures that its last token sees, and none sees a later word."""

from __future__ import annotations

import torch
from torch.testing import assert_close

import headwater as hw
from headwater.lens.loading import zoo
from headwater.lens.running.written import written_behind


def test_words_see_the_pictures_of_the_last_token():
    hf = zoo.build("mllama")
    model = hw.load(hf)
    given = dict(model.sample)
    ids, given = (
        given["input_ids"][:1],
        {name: value[:1] for name, value in given.items() if name != "attention_mask"},
    )
    given.pop("input_ids")
    _, images, tiles = given["pixel_values"].shape[:3]
    sees = torch.ones(1, ids.shape[1], images, tiles, dtype=torch.long)
    sees[:, :2] = 0
    row = model.to_tokens(ids, cross_attention_mask=sees, **given)
    told = hf.generate(
        input_ids=row.ids, attention_mask=row.mask.long(), **row.more, max_new_tokens=3, do_sample=False,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    words = told.sequences[0, -3:].tolist()
    found = model(written_behind(hf, row, words))[0, -4:-1]
    assert_close(found, torch.cat(told.logits), atol=1e-4, rtol=1e-4)


def test_a_word_sees_no_later_word_where_the_prompt_is_read_in_both_directions():
    hf = zoo.build("paligemma")
    model = hw.load(hf)
    given = zoo.inputs("paligemma", lengths=(11,)) | {"token_type_ids": torch.zeros(1, 20, dtype=torch.long)}
    prompt = model.to_tokens(given.pop("input_ids"), given.pop("attention_mask"), **given)
    one, other = (model(written_behind(hf, prompt, [5, last])) for last in (6, 9))
    assert_close(one[:, :21], other[:, :21])
