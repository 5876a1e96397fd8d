"""The bytes of a picture or a sound, which may come from a stranger: a plain file of bounded size, never a link."""

from __future__ import annotations

import os
import stat
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.files import as_path, bounded

MOST_BYTES = 64 * 2**20


def content(given: str | PathLike[str] | bytes, what: str) -> tuple[bytes, str]:
    """The content and the name that messages use; PromptError for links, pipes, devices and large files."""
    if isinstance(given, bytes):
        if len(given) > MOST_BYTES:
            raise PromptError(f"{what} is larger than {MOST_BYTES // 2**20} MiB; give a smaller one")
        return given, what
    path = as_path(given, PromptError)
    # a pipe would wait for its writer, and what a link points at may change between two looks
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        if path.is_symlink():
            raise PromptError(f"{path} is a link; give the file itself")
        number = os.open(path, flags)
    except OSError as error:
        raise PromptError(f"{path} can not be read: {error.strerror or error}; give another path") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise PromptError(f"{path} is not a plain file; give {what} as a file")
    with os.fdopen(number, "rb") as source:
        return bounded(source, str(path), MOST_BYTES, PromptError), str(path)


def as_array(given: Any) -> np.ndarray:
    """Numbers of any device and precision, also with a gradient; numpy has no bfloat16, which becomes float32."""
    if not isinstance(given, Tensor):
        return np.asarray(given)
    given = given.detach().cpu()
    return (given.float() if given.is_floating_point() else given).numpy()
