"""What a model is given: the text, the picture and the decoder's text of a state, as one `Example`."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import headwater as hw
from headwater.dashboard.running.models import prompt_of, reads
from headwater.dashboard.running.prompts import own_texts
from headwater.dashboard.state import workspace
from headwater.dashboard.state.state import State
from headwater.lens.errors import PromptError
from headwater.lens.examples.sample_pictures import sample_pictures
from headwater.lens.media.pictures import picture
from headwater.lens.models.embedded import embedded
from headwater.lens.trained.registry import TRAINED

DEFAULT_TEXT = "When Mary and John went to the store , John gave a drink to"
WRITTEN_TEXT = "When Mary and John went to the store, John gave a drink to"  # as people write it
SAMPLE = "sample:"
MARK = "<image>"
KINDS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")


@dataclass(frozen=True)
class Input:
    """One example, and the key under which results on it are kept: equal keys, equal examples."""

    example: hw.Example | str
    key: tuple[str, str, str]

    @property
    def text(self) -> str:
        return self.key[0]


def first_text(model: str) -> str:
    """The text that a model is shown on before another is typed."""
    said = prompt_of(model)
    if said is not None:
        return said
    samples = sample_pictures(model)
    if samples:
        return next(iter(samples.values())).text or ""
    if own := own_texts(model):
        return own[0]
    given = model in TRAINED or model not in embedded()
    return WRITTEN_TEXT if given else DEFAULT_TEXT


def fill(state: State, model: hw.HookedModel) -> None:
    """Give the state what it lacks for its model: a first text, a first picture."""
    what = reads(model)
    if what.text and not state.text:
        state.text = first_text(state.model)
        if what.picture and MARK not in state.text and model.image_token is not None:
            state.text = f"{MARK} {state.text}"
    if what.picture and not state.picture and (samples := sample_pictures(state.model)):
        state.picture = SAMPLE + next(iter(samples))


def given(state: State, model: hw.HookedModel, text: str | None = None) -> Input:
    """The input of a state; `text` stands in the place of the state's. PromptError where a needed part is missing."""
    what = reads(model)
    text = (state.text if text is None else text) if what.text else ""
    decoder = state.decoder if what.decoder else ""
    wanted = what.picture and not (what.text and model.has_lm_head and MARK not in text)
    shown = image_of(state) if wanted else None
    if wanted and shown is None:
        ways = "choose a sample or upload one" if sample_pictures(state.model) else "upload one"
        raise PromptError(f"{model.name} reads a picture: {ways}, at the left")
    if shown is None and not decoder:
        return Input(text, (text, "", ""))
    example = hw.Example(text=text or None, image=shown, decoder=decoder or None)
    return Input(example, (text, state.picture if shown is not None else "", decoder))


def given_to_b(state: State, name: str, model: hw.HookedModel) -> Input:
    """The input of run B, for the model `name`. PromptError where that reads what run A has none of."""
    if state.b_model is None:
        return given(state, model, state.b_text)
    what, text = reads(model), state.text if state.b_text is None else state.b_text
    told = None
    if what.text and not text and not what.picture:
        told = "reads texts, and run A is of a picture alone; give run B a model that reads pictures"
    elif what.picture and not state.picture and not (what.text and model.has_lm_head and text):
        told = "reads pictures, and run A is of a text; give run B a model that reads texts"
    if told is not None:
        raise PromptError(f"{name} {told}, or choose {name} at the left")
    found = given(state, model, state.b_text)
    # samples of two models may have one name and be two pictures
    picture = f"{found.key[1]} of {state.model}" if found.key[1] else ""
    return replace(found, key=(found.key[0], picture, found.key[2]))


def image_of(state: State) -> Any:
    """The picture, or the frames of a film; None where the state names none."""
    if state.picture.startswith(SAMPLE):
        samples = sample_pictures(state.model)
        found = samples.get(state.picture.removeprefix(SAMPLE))
        if found is None:
            raise PromptError(
                f"{state.model} has no sample {state.picture.removeprefix(SAMPLE)[:60]!r}; choose another"
            )
        return found.image
    if not state.picture:
        return None
    content = workspace.kept("pictures", state.picture)
    if content is None:
        raise PromptError(
            "the picture of this link is not kept on this machine; upload it, or choose a sample"
        )
    return picture(content, "the picture")


def take_picture(content: bytes) -> str:
    """Keep an uploaded picture, and give its name. PromptError for what is none or too large."""
    opened = picture(content, "the uploaded file")
    out, plain = io.BytesIO(), opened.convert("RGB")
    plain.info = {}  # what is kept holds no metadata of the file, such as the colour profile of a camera
    plain.save(out, "PNG")
    return workspace.keep("pictures", out.getvalue())
