"""WAV files of every depth give the samples that were written; other rates are resampled, broken files refused.

Seen to fail: 8 bits read as signed, channels read one behind the other, a rate that was not looked at.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from headwater.lens.errors import PromptError
from headwater.lens.media.sounds import sound

WAVE = np.sin(np.arange(1600) / 1600 * 2 * np.pi * 20) / 2  # 20 turns in 0.1 s at 16,000


def saved(samples, rate=16000):
    into = io.BytesIO()
    wavfile.write(into, rate, samples)
    return into.getvalue()


def test_every_depth_is_the_same_wave(tmp_path):
    depths = {
        np.uint8: WAVE * 128 + 128, np.int16: WAVE * 2**15, np.int32: WAVE * 2**31, np.float32: WAVE,
    }  # fmt: skip
    for kind, samples in depths.items():
        found = sound(saved(samples.astype(kind)), 16000)
        np.testing.assert_allclose(found, WAVE, atol=1 / 100 if kind == np.uint8 else 1e-4)
    (tmp_path / "a.wav").write_bytes(saved(WAVE.astype(np.float32)))
    np.testing.assert_allclose(sound(tmp_path / "a.wav", 16000), WAVE, atol=1e-6)


def test_channels_become_their_mean_and_rates_the_models():
    with pytest.warns(UserWarning, match="2 channels; their mean is read"):
        found = sound((np.stack([WAVE, 0 * WAVE], 1), 16000), 16000)
    np.testing.assert_allclose(found, WAVE / 2, atol=1e-6)
    found = sound((WAVE, 16000), 8000)
    assert len(found) == 800
    np.testing.assert_allclose(found[50:-50], WAVE[::2][50:-50], atol=1e-3)


def test_what_is_no_sound_is_refused():
    whole = saved(WAVE.astype(np.int16))
    for data, told in ((b"ID3 mp3", "convert it"), (whole[:30], "no WAV file"), (whole[:500], "no WAV file")):
        with pytest.raises(PromptError, match=told):
            sound(data, 16000)
    for given, told in (
        (WAVE, "samples, rate"),
        ((WAVE, 3), "samples a second"),
        ((WAVE * np.nan, 16000), "NaN"),
    ):
        with pytest.raises(PromptError, match=told):
            sound(given, 16000)
    with pytest.raises(PromptError, match="lasts 700 s"):
        sound((np.zeros(700_000), 1000), 16000)


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (np.zeros((2, 1000)), r"\[2, 1000\]; give \[sample, channel\]"),
        ([[1.0], [1.0, 2.0]], "no array"),
        (np.full(100, 1e300), "huge"),
    ],
)
def test_samples_that_can_not_be_heard_are_refused(samples, told) -> None:
    with pytest.raises(PromptError, match=told):
        sound((samples, 8_000), 16_000)


def test_samples_of_any_precision_are_heard() -> None:
    given = torch.linspace(-1, 1, 100)
    for same in (given.clone().requires_grad_(), given.bfloat16()):
        np.testing.assert_allclose(sound((same, 8_000), 8_000), given, atol=5e-3)
