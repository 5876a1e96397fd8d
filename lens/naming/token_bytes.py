"""Names for tokens that are parts of a character: their bytes, where a decoder has only a replacement sign."""

from __future__ import annotations

import re
from typing import Any

UNREADABLE = "\ufffd"
FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # a byte of a SentencePiece vocabulary
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
# byte-level BPE writes each byte as one letter: itself where it can be seen, else one from 256 on (Radford et al. 2019)
BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


def token_text(tokenizer: Any, number: int) -> str:
    """What the token says; bytes that are no whole character by their numbers, "‹E6 97›", and not as "�"."""
    text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    if UNREADABLE not in text:
        return text
    content = _bytes_of(tokenizer.convert_ids_to_tokens(number))
    if content is None or content.decode(errors="replace").strip() != text.strip():
        return text  # the tokenizer writes its tokens in another way
    return readable(content)


def readable(content: bytes) -> str:
    """Bytes as text, those that are no whole character by their numbers.

    >>> readable(" 日".encode()[:-1])
    ' ‹E6 97›'
    """
    shown, broken = "", b""
    while content or broken:
        try:
            text, bad, content = content.decode(), b"", b""
        except UnicodeDecodeError as error:
            text, bad = content[: error.start].decode(), content[error.start : error.end]
            content = content[error.end :]
        if broken and (text or not bad):
            shown, broken = f"{shown}‹{broken.hex(' ').upper()}›", b""
        shown, broken = shown + text, broken + bad
    return shown


def _bytes_of(piece: Any) -> bytes | None:
    """The bytes that a token of the vocabulary stands for, or None where it is not written in bytes."""
    if not isinstance(piece, str):
        return None
    if found := FALLBACK.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return bytes(BYTE_OF[letter] for letter in piece) if all(letter in BYTE_OF for letter in piece) else None
