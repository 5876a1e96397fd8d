"""Scores of a run that are finished, in a journal, so that a run that was stopped goes on where it stood."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._prompts.examples import as_tokens
from headwater.analyses._prompts.pairs import Pairs
from headwater.analyses.circuits._counterfactuals import Case
from headwater.lens.errors import AnalysisError
from headwater.lens.files import digest_of
from headwater.lens.journal import Journal
from headwater.lens.model import HookedModel
from headwater.lens.records.provenance import provenance


class Finished:
    """Finished scores by name. A piece also keeps the measure of its pairs, which tells another measure."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, path: str | Path | None, model: HookedModel, batches: Sequence[Pairs], **settings: Any
    ) -> Iterator[Finished]:
        """The finished scores of a run over `batches` with these settings, plain data; None keeps no file."""
        told = {**provenance(model), "device": model.device.type, "pairs": _digest(batches), **settings}
        with Journal.open(path, told, lambda fault: AnalysisError(f"resume: {fault}")) as journal:
            yield cls(journal)

    def holds(self, name: str, case: Case) -> bool:
        """Whether an earlier run, or this one, kept the scores."""
        return self._journal.get(_piece(name, case)) is not None

    def scores(self, name: str, case: Case, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, float64, or what an earlier run kept of it."""
        if self._journal.path is None:
            return compute()
        name = _piece(name, case)
        kept, ends = self._journal.get(name), case.told.ends.tolist()
        if kept is None:
            found = compute().double().contiguous()
            bits = base64.b64encode(found.numpy().astype("<f8").tobytes()).decode()
            self._journal.put(name, {"measure": ends, "shape": list(found.shape), "float64": bits})
            return found
        if not np.allclose(kept["measure"], ends, rtol=1e-4, atol=1e-5):
            raise AnalysisError(
                f"resume: {self._journal.path} was begun with other values of the measure on the same prompts (another "
                "measure, answer or machine?); delete it"
            )
        bits = np.frombuffer(base64.b64decode(kept["float64"]), "<f8")
        return torch.from_numpy(bits.astype(np.float64)).view(kept["shape"])


def _piece(name: str, case: Case) -> str:
    return f"{case.pairs.places[0]}/{name}"


def _digest(batches: Sequence[Pairs]) -> str:
    """A digest of both prompts of all pairs, in their groups."""
    told = []
    for batch in batches:
        for side in (as_tokens(batch.clean), as_tokens(batch.corrupt)):
            told.append([side.ids.tolist(), [[name, given.tolist()] for name, given in side.more.items()]])
    return digest_of([[batch.places for batch in batches], told])
