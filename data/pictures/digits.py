"""Handwritten digits, 1,797 pictures of 8×8 pixels in 17 greys; real ones, of 13 people.

Source: the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn ships it, unchanged and whole.
"""

from functools import cache
from pathlib import Path

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 5  # each fifth picture is held out


@cache
def _file() -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        return file["images"], file["labels"].astype(np.int64)


def digits(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pictures float32 [digit, 8, 8], from 0 to 1, and what they show, int64 [digit].

    360 of the 1,797 are held out; no model of this folder's neighbours is trained on them.

    >>> from headwater.data.pictures.digits import digits
    >>> pictures, labels = digits(held_out=True)
    >>> pictures.shape, labels[:5].tolist()
    ((360, 8, 8), [0, 5, 0, 5, 0])
    """
    images, labels = _file()
    chosen = (np.arange(len(labels)) % HELD_OUT == 0) == held_out
    return images[chosen].astype(np.float32) / 16, labels[chosen]
