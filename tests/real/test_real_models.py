"""The trained models as they were added: what they say, and their records beside transformers' own maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import headwater as hw
from headwater.lens.trained.convert import weights_digest
from headwater.lens.trained.registry import TRAINED, added_folder

pytestmark = pytest.mark.real
PROMPT = "When Mary and John went to the store, John gave a drink to"


def eager(kind: str, name: str, **given: torch.Tensor) -> list[torch.Tensor]:
    """The attention weights of each layer, [head, query, key], from transformers on the same folder."""
    model = getattr(transformers, kind).from_pretrained(
        added_folder(name), attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return [weights[0] for weights in model(**given, output_attentions=True).attentions]


def held(record: hw.Record, maps: list[torch.Tensor]) -> None:
    """Patterns and statistics of a record are those of the dense maps."""
    stacked = torch.stack(maps).double()  # [layer, head, query, key]
    plogp = torch.where(stacked > 0, stacked * stacked.clamp(min=1e-300).log(), 0.0)
    expected = {"entropy": -plogp.sum(-1), "max": stacked.amax(-1), "first": stacked[..., 0]}
    for name, values in expected.items():
        np.testing.assert_allclose(record.statistic(name).values[0], values, atol=2e-4, err_msg=name)
    for layer in (0, len(maps) // 2, len(maps) - 1):
        np.testing.assert_allclose(record.pattern(layer, 1)[0], maps[layer][1], atol=2e-5)


def test_smollm2_knows_the_capital_of_france(smollm2: hw.HookedModel) -> None:
    assert smollm2.to_strings(smollm2("The capital of France is")[0, -1].argmax()[None]) == [" Paris"]
    assert (smollm2.n_layers, smollm2.n_heads, smollm2.d_model, smollm2.context) == (30, 9, 576, 8192)


def test_smollm2_prefers_the_person_who_did_not_act(smollm2: hw.HookedModel) -> None:
    """Eight draws of the set; a chance reader has a mean difference of 0."""
    differences = []
    for example in hw.prompt_set("indirect_object", n=8, model=smollm2):
        logits = smollm2(example.prompt)[0, -1]
        answer, wrong = (smollm2.to_tokens(word).ids[0, -1] for word in (example.answer, example.wrong[0]))
        differences.append(float(logits[answer] - logits[wrong]))
    assert np.mean(differences) > 1.5
    assert sum(each > 0 for each in differences) >= 6


def test_smollm2_is_recorded_as_transformers_computes_it(smollm2: hw.HookedModel) -> None:
    tokens = smollm2.to_tokens(PROMPT)
    record = smollm2.record(tokens, statistics=("entropy", "max", "first"))
    held(record, eager("LlamaForCausalLM", "smollm2-135m", input_ids=tokens.ids))


def test_dinov2_is_recorded_on_a_grid_as_transformers_computes_it(dinov2: hw.HookedModel) -> None:
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    record = dinov2.record(pixel_values=pixels, statistics=("entropy", "max", "first"))
    assert record.strings[0] == ["[CLS]", *(f"{row},{column}" for row in range(16) for column in range(16))]
    held(record, eager("Dinov2Model", "dinov2-small", pixel_values=pixels))


def test_minilm_places_sentences_of_one_meaning_together(minilm: hw.HookedModel) -> None:
    texts = [
        "A man is playing a guitar.",
        "Someone plays a musical instrument.",
        "The stock market fell sharply.",
    ]
    tokens = minilm.to_tokens(texts)
    states, mask = minilm.embeddings(tokens), tokens.mask[..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    alike, apart = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert alike > 0.5
    assert apart < 0.2


@pytest.mark.parametrize("fixture", ["smollm2", "dinov2", "minilm"])
def test_their_weights_are_those_that_were_looked_at(fixture: str, request: pytest.FixtureRequest) -> None:
    """Every byte, where opening looks at sizes and times."""
    name = request.getfixturevalue(fixture).name
    assert weights_digest(added_folder(name)) == TRAINED[name].weights
