"""Settings of an address that are of another kind than the page's, and texts without an answer."""

from __future__ import annotations

import random

import pytest
import torch
from opened_app import opened, settled
from strange_addresses import settings, strange
from tokenizers import Tokenizer, models as word_models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from headwater.dashboard import pages
from headwater.dashboard.running import models

TEXT = "When Mary and John went to the store"
STRANGE = {
    "heads.score": "[1]", "heads.columns": "[[1]]", "heads.view": "{}", "flow.residual": "x", "flow.methods": '{"a":1}',
    "flow.edge": '["a",[1],null]', "flow.heads": "null", "sinks.limit": "null", "sinks.keys": "[[1],99,true,2,2]",
    "sinks.least": "1e400", "head.window": "[5,2,0,0]",
}  # fmt: skip


@pytest.mark.parametrize("page", ["heads", "head", "flow", "sinks"])
def test_settings_of_other_kinds_give_way(offered, page):
    app = settled(opened(page, model="small", prompt=TEXT, **STRANGE))
    assert not app.error
    if page == "sinks":
        assert app.multiselect(key="bound-sinks-keys").value == [2]


def test_start_of_a_masked_model_without_a_mask_says_so_in_its_card(offered, tmp_path):
    folder = tmp_path / "masked"
    names = ["[PAD]", "[UNK]", "[MASK]", *TEXT.split()]
    words = Tokenizer(word_models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", mask_token="[MASK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    models.allow(str(folder))
    app = settled(opened("start", model="masked", prompt=TEXT))
    assert not app.error
    assert any("put the mask token into the text" in each.value for each in app.caption)
    assert {"Where does attention drain?", "What if it did not?"} <= {each.value for each in app.subheader}


@pytest.mark.slow
@pytest.mark.parametrize("page", pages.PAGES)
def test_no_address_stops_a_page(offered, page):
    rng, names = random.Random(page), [name for name in settings() if name.startswith(page[:4])]
    for _ in range(2):
        address = strange(rng, names or settings()) | {"model": "small", "prompt": TEXT}
        assert not settled(opened(page, **address)).exception
