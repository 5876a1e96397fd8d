"""`sound`: a WAV file or a waveform as one channel of float32 samples at the rate that a model reads.

A waveform is given with its rate, `(samples, rate)`: nothing else tells how fast it is. Several channels become their
mean, with a warning.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from os import PathLike
from typing import Any

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.media.sources import as_array, content

MOST_SECONDS = 600
UNKNOWN = 2**32 - 1  # the size of data that was not known when the header was written
LOUDEST = 1e6  # far above 1, and its squares are numbers still
RATES = 1_000, 384_000  # samples a second
Sound = Any  # a path, bytes, or (samples [sample] or [sample, channel], rate)


def is_waveform(given: object) -> bool:
    """Whether this is (samples [sample] or [sample, channel], samples a second)."""
    if not isinstance(given, tuple) or len(given) != 2 or isinstance(given[1], bool | np.bool_):
        return False
    if not isinstance(given[1], int | np.integer) or not isinstance(given[0], np.ndarray | Tensor | list):
        return False
    return np.ndim(given[0]) in (1, 2)


def sound(given: Sound, rate: int, what: str = "the sound") -> np.ndarray:
    """Samples from −1 to 1, float32 [sample], at `rate` samples a second; PromptError tells what is wrong."""
    if isinstance(given, str | PathLike | bytes):
        samples, own, what = _of_file(given, what)
    elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | np.integer):
        samples, own = _samples(given[0], what), int(given[1])
    else:
        raise PromptError(f"{what} is a WAV file or (samples, rate); got {type(given).__name__}")
    if not RATES[0] <= own <= RATES[1]:
        raise PromptError(f"{what} has {own} samples a second; the rate is from {RATES[0]:,} to {RATES[1]:,}")
    if samples.ndim not in (1, 2) or not samples.size:
        raise PromptError(
            f"{what} has samples of shape {list(samples.shape)}; give [sample] or [sample, channel]"
        )
    if samples.ndim == 2 and samples.shape[1] > samples.shape[0]:
        raise PromptError(
            f"{what} has more channels than samples, {list(samples.shape)}; give [sample, channel], its transpose"
        )
    if len(samples) > MOST_SECONDS * own:
        raise PromptError(
            f"{what} lasts {len(samples) / own:.0f} s; the most is {MOST_SECONDS} s: give a part of it"
        )
    if not (abs(samples) <= LOUDEST).all():
        raise PromptError(f"{what} holds NaN, infinite or huge samples; give numbers from -1 to 1")
    if samples.ndim == 2:
        if samples.shape[1] > 1:
            warnings.warn(f"{what} has {samples.shape[1]} channels; their mean is read", stacklevel=3)
        samples = samples.mean(1)
    shared = math.gcd(own, rate)
    if own != rate:
        samples = resample_poly(samples.astype(np.float64), rate // shared, own // shared)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _of_file(given: str | PathLike[str] | bytes, what: str) -> tuple[np.ndarray, int, str]:
    data, name = content(given, what)
    if data[:4] not in (b"RIFF", b"RIFX", b"RF64") or data[8:12] != b"WAVE":
        raise PromptError(f"{name} is no WAV file; convert it, as in: ffmpeg -i IN OUT.wav")
    _check_length(data, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", wavfile.WavFileWarning)
            warnings.filterwarnings("ignore", ".*not understood", wavfile.WavFileWarning)
            own, samples = wavfile.read(io.BytesIO(data))
    except Exception as error:  # a broken header may raise anything
        told = " ".join(str(error).split())
        raise PromptError(
            f"{name} is no WAV file that can be read: {told:.200}; give PCM or float samples"
        ) from None
    return _samples(samples, name), own, name


def _check_length(data: bytes, name: str) -> None:
    """PromptError where fewer samples came than the header says; a sound that was written into a pipe says nothing."""
    order, at = ">" if data[:4] == b"RIFX" else "<", 12
    while at + 8 <= len(data):
        size = struct.unpack(f"{order}I", data[at + 4 : at + 8])[0]
        end = at + 8 + size
        if data[at : at + 4] == b"data":
            if end > len(data) and size != UNKNOWN:
                raise PromptError(
                    f"{name} is no WAV file that is whole: it says {size:,} bytes of samples and has "
                    f"{len(data) - at - 8:,}; give all of it"
                )
            return
        at = end + size % 2


def _samples(given: Any, what: str) -> np.ndarray:
    """Samples as numbers from −1 to 1, whatever whole numbers they were."""
    try:
        samples = as_array(given)
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(
            f"{what} has samples that are no array; give [sample] or [sample, channel]"
        ) from None
    if samples.dtype == np.uint8:
        return samples.astype(np.float64) / 128 - 1
    if np.issubdtype(samples.dtype, np.signedinteger):
        return samples / float(2 ** (8 * samples.dtype.itemsize - 1))  # 24 bits stand in the upper bits of 32
    if not np.issubdtype(samples.dtype, np.floating):
        raise PromptError(f"{what} has samples of {samples.dtype}; give floating-point or whole numbers")
    return samples
