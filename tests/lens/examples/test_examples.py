"""`example.py`, `inputs.py`, `processor.py`: held to the model's processor and to transformers called by hand."""

from __future__ import annotations

import json
import wave

import numpy as np
import pictured_texts
import pytest
import torch
import transformers as T
from PIL import Image

import headwater as hw
from headwater.lens.errors import ModelError, PromptError
from headwater.lens.examples.processor import processor_of
from headwater.lens.loading import zoo


def photo(width=40, height=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vit():
    hf = zoo.build("vit_classifier")
    side = hf.config.image_size
    maker = T.ViTImageProcessorPil(
        size={"height": side, "width": side},
        **({} if hf.config.num_channels == 3 else {"do_convert_rgb": False}),
    )
    return hw.load(hf, processor=maker), maker


def test_a_picture_in_every_form_is_what_the_processor_makes(vit, tmp_path):
    model, maker = vit
    Image.fromarray(photo()).save(tmp_path / "a.png")
    wanted = maker(images=[Image.fromarray(photo())], return_tensors="pt")["pixel_values"]
    file, array = tmp_path / "a.png", photo()
    forms = (
        array,
        file,
        str(file),
        Image.fromarray(array),
        [array],
        file.read_bytes(),
        hw.Example(image=array),
    )
    for given in (*forms, [hw.Example(image=[array])]):
        assert torch.equal(model.to_tokens(given).more["pixel_values"], wanted)
    plain = model.hf(pixel_values=wanted).logits
    torch.testing.assert_close(model(photo()), plain)
    torch.testing.assert_close(model([photo(), photo(seed=1)])[:1], plain)
    loss = model.loss([hw.Example(image=photo(), label=1)])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(plain, torch.tensor([1]))[None])
    assert model.record(photo()).pattern(layer=0, head=0).shape[0] == 1


def test_a_model_without_processor_asks_for_one():
    model = hw.load(zoo.build("vit_classifier"))
    with pytest.raises(PromptError, match=r"came without a processor.*processor=.*pixel_values="):
        model.record(photo())
    with pytest.raises(ModelError, match="processor is a processor of transformers"):
        hw.load(model.hf, processor=3)


def test_two_towers_read_text_and_picture():
    model = hw.load(zoo.build("clip"))
    side = model.hf.config.vision_config.image_size
    maker = T.ViTImageProcessorPil(size={"height": side, "width": side})
    model.processor = maker
    examples = [hw.Example(ids=[3, 4, 5, 2], image=photo()), hw.Example(ids=[6, 7, 2], image=photo(seed=1))]
    pixels = maker(images=[Image.fromarray(photo(seed=n)) for n in (0, 1)], return_tensors="pt")[
        "pixel_values"
    ]
    for n, ids in enumerate(([3, 4, 5, 2], [6, 7, 2])):
        out = model.hf(input_ids=torch.tensor([ids]), pixel_values=pixels[n : n + 1])
        cosine = torch.cosine_similarity(out.text_embeds, out.image_embeds)
        torch.testing.assert_close(model.loss(examples)[n], 1 - cosine[0])


def test_a_text_with_a_picture_needs_its_place():
    model = hw.load(zoo.build("llava"))
    side = model.hf.config.vision_config.image_size
    model.processor = T.ViTImageProcessorPil(size={"height": side, "width": side})
    token = model.image_token
    found = model.to_tokens(hw.Example(ids=[3, token, 4], image=photo()))
    assert int((found.ids == token).sum()) == model.image_tokens
    one, two = (
        hw.Example(ids=[3, token, 4], image=photo()),
        hw.Example(ids=[token, token], image=[photo(), photo()]),
    )
    both = model.to_tokens([one, two])
    assert both.mask.sum(-1).tolist() == [2 + model.image_tokens, 2 * model.image_tokens]
    for n, each in enumerate((one, two)):
        alone = model(each)
        torch.testing.assert_close(model(both)[n, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(PromptError, match="1 images take"):
        model.to_tokens(hw.Example(ids=[3, 4], image=photo()))
    with pytest.raises(PromptError, match="stands for an image"):
        model.to_tokens(hw.Example(ids=[3, token, 4]))


def _wav(path, rate=16_000):
    samples = (np.sin(np.arange(rate // 2) / 9) * 2**14).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return samples / 2**15


def test_a_sound_is_what_the_processor_hears(tmp_path):
    hf = zoo.build("whisper")
    frames = hf.config.max_source_positions * 2
    maker = T.WhisperFeatureExtractor(
        feature_size=hf.config.num_mel_bins, sampling_rate=16000, hop_length=80, chunk_length=1, n_fft=400
    )
    maker.n_samples, maker.nb_max_frames = frames * 80, frames
    model = hw.load(hf, processor=maker)
    samples = _wav(tmp_path / "a.wav")
    wanted = maker([samples.astype(np.float32)], sampling_rate=16_000, return_tensors="pt")["input_features"]
    for given in (
        tmp_path / "a.wav",
        (samples, 16_000),
        hw.Example(audio=(samples, 16_000), decoder=[1, 5, 6]),
    ):
        assert torch.equal(model.to_tokens(given).more["input_features"], wanted)
    found = model.to_tokens(hw.Example(audio=(samples, 16_000), decoder=[1, 5, 6]))
    plain = hf(input_features=wanted, decoder_input_ids=torch.tensor([[1, 5, 6]])).logits
    torch.testing.assert_close(model(found), plain)
    with pytest.raises(PromptError, match="reads one text, the decoder's"):
        model.to_tokens(hw.Example(audio=(samples, 16_000), text="a", decoder=[1]))


def test_two_texts_of_unequal_length_are_as_alone():
    model = hw.load(zoo.build("t5"))
    examples = [hw.Example(ids=[5, 6, 7, 1], decoder=[0, 8, 9]), hw.Example(ids=[5, 1], decoder=[0, 4])]
    both = model.loss(examples)
    for n, each in enumerate(examples):
        torch.testing.assert_close(both[n : n + 1], model.loss(each))
        out = model.hf(
            input_ids=torch.tensor([each.ids]), decoder_input_ids=torch.tensor([each.decoder])
        ).logits
        wanted = torch.nn.functional.cross_entropy(out[0, :-1], torch.tensor(each.decoder[1:]))
        torch.testing.assert_close(both[n], wanted)


def test_vectors_stand_in_the_place_of_tokens():
    model = hw.load(zoo.build("llama"))
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    vectors = model.hf.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(model(inputs_embeds=vectors), model(ids))
    record = model.record(inputs_embeds=vectors)
    assert record.strings[0] == ["vector 0", "vector 1", "vector 2", "vector 3"]
    torch.testing.assert_close(record.pattern(layer=1, head=0), model.record(ids).pattern(layer=1, head=0))
    with model.edit(hw.ScaleHeads({"0.0": 0.0})):
        torch.testing.assert_close(model(inputs_embeds=vectors), model(ids))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(
        model(inputs_embeds=vectors, attention_mask=mask)[0, 1:], model(ids[:1, 1:])[0], atol=1e-5, rtol=1e-4
    )
    for call in (model.loss, model.generate):
        with pytest.raises(PromptError, match=r"vectors|inputs_embeds"):
            call(inputs_embeds=vectors)
    with pytest.raises(PromptError, match="floating-point"):
        model(inputs_embeds=ids[..., None])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 10**9, "width": 4}},
            "height is 1000000000",
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 60_000}},
            "shortest_edge is 60000",
        ),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "n_samples": 10**12}, "n_samples is"),
        ({"image_processor_type": "Nothing"}, "can not be used"),
        ([1], "must hold a JSON object"),
    ],
)
def test_a_hostile_processor_is_refused_in_one_line(tmp_path, settings, told):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=told) as error:
        processor_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_thin_picture_is_refused_before_it_is_scaled(vit):
    model, _ = vit
    with pytest.raises(PromptError, match="one side may be 200 times the other"):
        model.record(np.zeros((1, 3000, 3), np.uint8))


def test_pairs_of_pictures_in_the_forms_of_users(vit, tmp_path):
    model, _ = vit
    for n in (0, 1):
        Image.fromarray(photo(seed=n)).save(tmp_path / f"{n}.png")
    wanted = hw.analyses.patch(model, [(hw.Example(image=photo()), hw.Example(image=photo(seed=1)))])
    for pair in ((photo(), photo(seed=1)), (tmp_path / "0.png", tmp_path / "1.png")):
        assert np.array_equal(hw.analyses.patch(model, [pair]).values, wanted.values)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # in transformers' PaliGemmaProcessor
def test_which_tokens_are_pictures_stays_beside_its_tokens() -> None:
    """PaliGemma reads its prompt in both directions where its processor says so, token by token."""
    hf, processor = pictured_texts.paligemma()
    texts = ("<image> what is", "<image> the cat sat on")
    pictures = [Image.fromarray(photo(seed=n)) for n in (0, 1)]
    plain = []
    for text, each in zip(texts, pictures, strict=True):
        made = processor(text=[text], images=[each], return_tensors="pt")
        assert "token_type_ids" in made
        plain.append(hf(**made).logits[0])
    model = hw.load(
        hf, processor=processor, sample=processor(text=[texts[0]], images=[pictures[0]], return_tensors="pt")
    )
    examples = [hw.Example(text=text, image=each) for text, each in zip(texts, pictures, strict=True)]
    together = model.to_tokens(examples)
    for n, wanted in enumerate(plain):
        torch.testing.assert_close(model(examples[n])[0], wanted)
        torch.testing.assert_close(model(together)[n][together.mask[n]], wanted)
    ids = hf.generate(
        **processor(text=[texts[0]], images=[pictures[0]], return_tensors="pt"), max_new_tokens=3
    )
    assert model.generate(examples, max_new_tokens=3)[0] == processor.decode(ids[0], skip_special_tokens=True)
