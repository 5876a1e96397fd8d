"""The labels of a head's classes: the configuration's, numbers where it has none that fit, start and end of spans."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers.utils import ModelOutput

from headwater.lens.models.classes import is_span, labels_of, logits_of


def head(**config):
    return SimpleNamespace(config=SimpleNamespace(**config), get_output_embeddings=lambda: None)


def test_labels_are_those_of_the_configuration_where_they_fit():
    out = ModelOutput(logits=torch.zeros(2, 3))
    assert labels_of(head(id2label={0: "a", 1: "b", 2: "c"}, num_labels=3), out) == ("a", "b", "c")
    assert labels_of(head(id2label={"1": "b", "0": "a", "2": "c"}, num_labels=3), out) == ("a", "b", "c")
    assert labels_of(head(id2label={0: "a", 5: "b", 2: "c"}, num_labels=3), out) == ("0", "1", "2")
    assert labels_of(head(), out) == ("0", "1", "2")
    assert labels_of(head(num_labels=2), out) == ("0",)  # one score for each of three tokens
    assert labels_of(head(), ModelOutput(last_hidden_state=torch.zeros(2, 3, 4))) == ()
    assert labels_of(head(), ModelOutput(logits_per_image=torch.zeros(2, 3))) == ()


def test_spans():
    out = ModelOutput(start_logits=torch.zeros(2, 5), end_logits=torch.ones(2, 5))
    found = logits_of(out)
    assert found is not None
    assert found.shape == (2, 5, 2)
    assert found[0, 0].tolist() == [0, 1]
    assert labels_of(head(), out) == ("start", "end")
    assert is_span(head(id2label={0: "LABEL_0"}), ("start", "end"))
    assert not is_span(head(id2label={0: "start", 1: "end"}), ("start", "end"))
