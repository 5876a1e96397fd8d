"""What counts as the same numbers: the largest difference counts, a NaN never passes, and the line tells the sizes.

Seen to fail: a mean in the place of the largest difference, `difference > allowed`, `least` left out,
a nested output left out, padding kept.
"""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from headwater.lens.errors import AnalysisError, ModelError
from headwater.lens.models.closeness import answer, close_or_refuse, of_real, relative_difference


def test_one_wrong_number_of_many_is_refused() -> None:
    expected = torch.linspace(-4, 4, 1000)
    found = expected.clone()
    found[10] += 0.02
    assert relative_difference(found, expected) == pytest.approx(0.005, rel=1e-4)
    close_or_refuse(found, expected, "the sum is wrong", allowed=0.0051)
    with pytest.raises(ModelError) as refused:
        close_or_refuse(found, expected, "the sum is wrong", "; load it", allowed=1e-3, error=ModelError)
    assert str(refused.value) == "the sum is wrong (relative difference 5.0e-03, allowed 1e-03); load it"


def test_nan_is_refused_and_numbers_near_zero_are_not() -> None:
    with pytest.raises(AnalysisError, match="relative difference nan"):
        close_or_refuse(torch.tensor([1.0, torch.nan]), torch.ones(2), "a number is missing")
    close_or_refuse(torch.tensor([1e-7]), torch.zeros(1), "zeros differ")
    with pytest.raises(AnalysisError, match=r"difference 1\.0e\+00"):
        close_or_refuse(torch.tensor([1e-7]), torch.zeros(1), "zeros differ", least=1e-7)


def test_half_precision_is_compared_in_float32() -> None:
    """300 and 300.25 are one number in bfloat16, and two in float32."""
    found = torch.tensor([300.0], dtype=torch.bfloat16)
    assert relative_difference(found, torch.tensor([300.25])) == pytest.approx(0.25 / 300.25)


def test_the_main_output_has_a_name_or_is_the_first_that_holds_numbers():
    logits, hidden = torch.rand(2, 3, 5), torch.rand(2, 3, 4)
    assert answer(CausalLMOutput(logits=logits, hidden_states=(hidden,))) is logits
    assert answer(BaseModelOutput(last_hidden_state=hidden)) is hidden
    assert answer({"ids": torch.arange(3), "towers": ({"pooled": hidden},)}) is hidden
    with pytest.raises(ModelError, match="dict holds no numbers"):
        answer({"ids": torch.arange(3)})


def test_rows_of_padding_are_left_out_where_the_output_belongs_to_the_text():
    output, mask = torch.rand(2, 3, 5), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert of_real(output, {"attention_mask": mask}).equal(torch.cat([output[0], output[1, :1]]))
    assert of_real(output[:, :2], {"attention_mask": mask}).equal(output[:, :2])
    decoder = {"attention_mask": mask, "decoder_attention_mask": torch.ones_like(mask)}
    assert of_real(output, decoder).equal(output.flatten(0, 1))
