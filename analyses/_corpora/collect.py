"""`corpus`: statistics of every head over the texts of a file or folder, which may be stopped, resumed and divided."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from headwater.analyses._corpora.measure import Numbers, Text, of_layer
from headwater.analyses._corpora.result import Corpus
from headwater.analyses._corpora.shards import Shard
from headwater.analyses._corpora.sources import Row, Source, Unit
from headwater.analyses._corpora.state import State
from headwater.analyses._corpora.tokens import fitting, tokens_of
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError, RecordError
from headwater.lens.files import alone, as_path, check_target
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

FORMAT = 1
SAVED_EVERY = 30.0  # seconds of work that a killed run loses at most
Saved = Callable[[int, int], object]


def corpus(
    model: HookedModel, texts: str | Path, *, out: str | Path | None = None, length: int | None = None,
    keep: int = 5, shard: tuple[int, int] = (1, 1), texts_at_most: int | None = None, field: str = "text",
    unit: Unit = "file", anew: bool = False, on_save: Saved | None = None,
) -> Corpus:  # fmt: skip
    """Statistics of every head over the texts of a file or folder (.jsonl, .txt, .parquet, a `datasets` folder).

    Each text runs alone, so nothing is padded and a text's numbers are the same in every shard; it is read when its
    turn comes. Longer texts than `length` tokens (None: the model's context) are cut, a closing special token kept.
    Blank texts and texts of one token are counted and left out. Memory is linear in the length of a text: maps are
    read in blocks of rows. `keep` is the number of examples of each statistic and head, one a text.

    `texts` is a file or a folder, `field` the key or column with the text; a text of a .txt file is the whole "file",
    or a "paragraph" between blank lines (`unit`). `texts_at_most` takes the first ones only.

    `out` is a .safetensors file, written whole every half minute: the same call goes on where a killed one stood. A
    file of another model, other texts or settings is refused, or with `anew` replaced; one that another run has is
    refused. `on_save(done, of)` hears how many texts are done, first when this call begins with the next one, then at
    every writing.

    `shard=(i, n)` takes every n-th text from the i-th on, i from 1 to n; `Corpus.merge` adds shards up. Sums are whole
    numbers of a quantum, so all of a merged result is the same, bit for bit, in whatever order shards come. The number
    of threads may change the last digits of a text.

    Sinks are those of Gu et al. (a key that receives more than 0.3 of the weights of the queries that see it), for each
    text and head; sink-free statistics set them aside and divide by what is left, and leave out rows of which less than
    0.001 is left. Rows that see one key are left out; "duplicate" and "induction" are of rows whose token stood in the
    text before. AnalysisError for a model without a text part of its own, and for maps with negative weights.

    Not for: saying what a head does to the output (attention is no effect).

    >>> import tempfile
    >>> from pathlib import Path
    >>> import headwater as hw
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, text in {"a.txt": "When Mary and John went", "b.txt": "Mary gave a drink to John"}.items():
    ...     _ = (folder / name).write_text(text)
    >>> found = hw.corpus(hw.load("tasks-4l"), folder)
    >>> found.state.told["texts"], found.mean("entropy").dims
    (2, ('layer', 'head'))
    >>> found.examples(*found.find("previous", n=1).index[0], "previous")[0].where
    'a.txt'
    """
    source = Source.of(texts, field, unit)
    run = _asked(model, source, length, keep, texts_at_most)
    target = None if out is None else check_target(as_path(out, RecordError), RecordError)
    part = Shard.checked(shard, AnalysisError)
    with nullcontext() if target is None else alone(target, RecordError):
        found = _begun(target, run, part, anew) or Corpus(
            State.empty(len(run["layers"]), run["heads"], keep), run,
            [{"shard": part.number - 1, "of": part.of, "rows": 0, "digest": "", "finished": False}],
        )  # fmt: skip
        if not found.shards[0]["finished"]:
            _go_on(found, model, source, target, on_save)
    return found


def _asked(
    model: HookedModel, source: Source, length: int | None, keep: int, texts_at_most: int | None
) -> dict[str, Any]:
    """What decides the numbers, as plain data."""
    if model.is_encoder_decoder or not model.vocab or not model.layers:
        raise AnalysisError(
            f"{model.name} reads no text of its own with attention; open a model or a part that does"
        )
    length = fitting(model, length)
    _least(keep, "keep", 1)
    if texts_at_most is not None:
        _least(texts_at_most, "texts_at_most", 1)
    return {
        "format": FORMAT, "model": model.name, "revision": model.revision, "layers": list(model.layers),
        "heads": model.n_heads, "length": length, "keep": keep, "at_most": texts_at_most,
        "prepend_bos": model.prepend_bos, "source": source.told(),
    }  # fmt: skip


def _least(value: int, name: str, least: int) -> None:
    if type(value) is not int or value < least:
        raise AnalysisError(f"{name} is a whole number, at least {least}; got {value!r}")


def _begun(target: Path | None, run: dict[str, Any], shard: Shard, anew: bool) -> Corpus | None:
    """What an earlier call has collected in the file; None where it is to begin."""
    if target is None or anew or not target.exists():
        return None
    found = Corpus.open(target, verify=True)
    if found.run != run:
        name = next(key for key in run if found.run.get(key) != run[key])
        raise RecordError(f"{target} is of another run ({name} differs); give another file, or begin anew")
    if [(part["shard"] + 1, part["of"]) for part in found.shards] != [shard]:
        raise RecordError(f"{target} is of other shards; give another file, or begin anew")
    return found


def _go_on(
    found: Corpus, model: HookedModel, source: Source, target: Path | None, on_save: Saved | None
) -> None:
    """Read on from where the shard stands, and save as time goes by."""
    part = found.shards[0]
    shard = Shard(part["shard"] + 1, part["of"])
    begun, known = part["rows"], part["digest"]
    most = found.run["at_most"]
    total = source.count() if most is None else min(source.count(), most)
    digest, saved = hashlib.sha256(), time.monotonic()

    def save() -> None:
        part["digest"] = digest.hexdigest()
        if target is not None:
            found.save(target)
        if on_save is not None:
            on_save(part["rows"], total)

    adding = False
    try:
        with progress(desc="texts", unit="text", total=total, done=begun) as bar:
            for row in islice(source, total):
                if row.number == begun and on_save is not None:
                    on_save(begun, total)
                if row.number == begun > 0 and digest.hexdigest() != known:
                    raise RecordError(f"the texts changed since {target} was written; begin anew")
                if row.number >= begun:
                    mine = shard.takes(row.number)
                    measured = _measured(model, found.run["length"], row.text) if mine else None
                    adding = True
                    if measured is not None:
                        _add(found, row, measured)
                    part["rows"] = row.number + 1
                digest.update(len(row.text).to_bytes(8, "little") + row.text.encode("utf-8", "surrogatepass"))
                adding = False
                bar.update(row.number >= begun)
                if time.monotonic() - saved > SAVED_EVERY and part["rows"] > begun:
                    save()
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if part["rows"] > begun and not adding:
            save()
        raise
    part["finished"] = True
    save()


class Measured(NamedTuple):
    """A text that was run: its tokens, what they are called, the different ones, whether it was cut, its numbers."""

    ids: np.ndarray
    words: list[str]
    kinds: np.ndarray
    cut: bool
    layers: list[Numbers]


def _measured(model: HookedModel, length: int, text: str) -> Measured | str:
    """The numbers of one text, or why it is left out."""
    if not text.strip():
        return "empty"
    tokens, cut = tokens_of(model, text, length)
    if len(tokens) < 2:
        return "short"
    ids = torch.tensor(tokens)
    with torch.no_grad():
        record = model.record(ids[None], statistics=(), keep=("qk",))
        asked = Text(ids.to(model.device))
        layers = [of_layer(_plain(record.map(layer), model), asked) for layer in model.layers]
    return Measured(
        ids.numpy().astype(np.int64), record.strings[0], asked.kinds[0].cpu().numpy(), cut, layers
    )


def _add(found: Corpus, row: Row, measured: Measured | str) -> None:
    if isinstance(measured, str):
        found.state.told[measured] += 1
        return
    found.state.told["cut"] += measured.cut
    found.words |= dict(zip(measured.ids.tolist(), measured.words, strict=True))
    found.state.add(row.number, row.where, measured.ids, measured.kinds, measured.layers)


def _plain(map: AttentionMap, model: HookedModel) -> AttentionMap:
    if map.signed or map.shape[2] != map.shape[3]:
        raise AnalysisError(
            f"{model.name} has maps that are no weights of a text on itself; a corpus reads such alone"
        )
    return map
