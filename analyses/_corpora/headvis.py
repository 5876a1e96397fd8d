"""`export_headvis`: a corpus in the public data form of HeadVis, which its viewer and Neuronpedia's loaders read.

The form and the six numbers are those of Neuronpedia's pipeline (hijohnnylin/neuronpedia, neuronpedia_utils/headvis,
after Luger, Kamath et al. 2026, transformer-circuits.pub/2026/headvis). It differs in three things. The numbers are not
rounded. Distances, tokens and the histogram are of all texts, not of the sequences that are shown. And no map is made:
the strongest keys of rows come from blocks of rows, so texts may be as long as the model takes.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from headwater.analyses._corpora.result import HEADVIS_NAMES, Corpus
from headwater.analyses._corpora.state import ACTIVATION_BINS
from headwater.analyses._corpora.statistics import DISTANCES, FRACTION, HEADVIS_LEAST, NAMES
from headwater.lens.errors import AnalysisError, RecordError
from headwater.lens.files import as_path, unwritten
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

INTERVALS, IN_INTERVAL, IN_TOP = 5, 3, 10
KEYS, LEAST = 8, 0.005  # of a row, the strongest keys; weights below that are left out
TOKENS = 50
ABOUT = {
    "self_attention_score": "Mean weight of a token on itself.",
    "prev_token_score": "Mean weight on the token before.",
    "pattern_entropy": "Mean entropy of the rows, in nats.",
    "qk_distance": "Mean |q - k| by weight.",
    "qk_distance_variance": "Variance of |q - k| by weight.",
    "induction_score": "Weight on the tokens after earlier copies of the query, a mean over queries that have some.",
}


class Shown(NamedTuple):
    """A text that a head's file shows: the interval of its largest weight, from 1, and that weight."""

    text: int
    interval: int
    largest: float


def export_headvis(
    corpus: Corpus, model: HookedModel, folder: str | Path, *, dataset: str | None = None
) -> Path:
    """Write `config.json`, `scatter_data.json` and `heads/L{layer}H{head}.json` of a corpus into a new folder.

    A head's file shows the texts with its largest weights (as many as the corpus keeps, ten at most) and some of a
    uniform sample for each lower fifth of these; `model`, whose weights must be those of the corpus, runs these texts
    once more. `dataset` names the corpus. The folder has its name only when it is complete. AnalysisError for another
    model or a corpus without a sample (`small`), RecordError for a folder that is there.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import headwater as hw
    >>> place = Path(tempfile.mkdtemp())
    >>> _ = (place / "texts.txt").write_text("When Mary and John went")
    >>> model = hw.load("tasks-4l")
    >>> written = hw.export_headvis(hw.corpus(model, place / "texts.txt"), model, place / "tree")
    >>> sorted(path.name for path in written.iterdir())
    ['attributions', 'config.json', 'heads', 'scatter_data.json', 'server_config.json']
    """
    target = as_path(folder, RecordError)
    if not corpus.whole:
        raise AnalysisError("a small result has no sample of texts; export the whole one")
    if model.revision != corpus.run["revision"]:
        raise AnalysisError(
            f"{model.name} has other weights than the corpus was read with ({corpus.run['model']})"
        )
    if target.exists():
        raise RecordError(f"{target} is there already; give a new folder")
    beside = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.part")
    try:
        (beside / "heads").mkdir(parents=True)
        (beside / "attributions").mkdir()
        _write_heads(corpus, model, beside)
        _write(beside / "scatter_data.json", _scatter(corpus))
        _write(beside / "config.json", _config(corpus, model, dataset or corpus.run["source"]["files"][0][0]))
        _write(beside / "server_config.json", {})
        _write(beside / "attributions" / "manifest.json", {})
        beside.rename(target)
    except OSError as error:
        raise unwritten(target, error, RecordError) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _scatter(corpus: Corpus) -> list[dict[str, Any]]:
    rows = corpus.headvis().reset_index().to_dict("records")
    return [{name: _finite(value) for name, value in row.items()} for row in rows]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _config(corpus: Corpus, model: HookedModel, dataset: str) -> dict[str, Any]:
    told, run = corpus.state.told, corpus.run
    run_told = {
        "model_name": run["model"], "dataset_name": dataset, "n_sequences": told["texts"], "seq_len": run["length"],
        "dtype": str(model.dtype).removeprefix("torch."), "attn_implementation": "headwater",
        "induction_attention_threshold": HEADVIS_LEAST, "n_intervals": INTERVALS, "samples_per_interval": IN_INTERVAL,
        "samples_per_top_interval": min(IN_TOP, corpus.state.keep), "sparse_topk_per_row": KEYS,
        "sparse_threshold": LEAST, "revision": run["revision"], "actual_sequences_processed": told["texts"],
        "num_hidden_layers": max(run["layers"]) + 1, "num_attention_heads": run["heads"],
        "attention_layer_indices": run["layers"],
    }  # fmt: skip
    return {
        "model_name": run["model"], "np_model_id": run["model"], "dataset_name": dataset,
        "heads": [[layer, head] for layer in run["layers"] for head in range(run["heads"])],
        "n_layers": max(run["layers"]) + 1, "n_heads": run["heads"], "n_intervals": INTERVALS,
        "metrics": list(HEADVIS_NAMES), "metric_descriptions": ABOUT, "head_data_pattern": "L{layer}H{head}.json",
        "has_umap": False, "umap_heads": [],
        "custom_plots": [
            {"key": "qk_distance_histogram", "label": "Q-K distance"},
            {"key": "histogram", "label": "Activation distribution"},
        ],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Top query tokens"},
            {"key": "top_key_tokens", "label": "Top key tokens"},
        ],
        "statistics_display": {
            "n_samples": {"label": "Samples kept", "format": "default"},
            "mean_max_activation": {"label": "Mean max activation", "format": "default"},
        },
        "pipeline_config": run_told,
    }  # fmt: skip


def _write_heads(corpus: Corpus, model: HookedModel, folder: Path) -> None:
    """Each text runs once; its rows go to a file beside each head's own until all texts have run."""
    shown = {
        (layer, head): _chosen(corpus, row, head)
        for row, layer in enumerate(corpus.layers)
        for head in range(corpus.heads)
    }
    texts = sorted({each.text for chosen in shown.values() for each in chosen})
    for text in progress(texts, desc="texts of heads", unit="text"):
        ids = corpus.state.kept[text][1]
        words = [model.tokenizer.decode([token]) for token in ids.tolist()]  # type: ignore[union-attr]
        with torch.no_grad():
            record = model.record(torch.from_numpy(ids)[None], statistics=(), keep=("qk",))
            for layer in corpus.layers:
                of_head = [
                    (head, one)
                    for head in range(corpus.heads)
                    for one in shown[layer, head]
                    if one.text == text
                ]
                if not of_head:
                    continue
                weights, keys = (
                    part[0].cpu().numpy() for part in record.map(layer).topk(min(KEYS, len(ids)))
                )
                for head, one in of_head:
                    sparse = _sparse(weights[head], keys[head], len(ids))
                    line = {"sequence_id": text, "interval": one.interval, "tokens": words, **sparse,
                            "seq_len": len(ids), "max_activation": one.largest}  # fmt: skip
                    with _lines(folder, layer, head).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    for (layer, head), chosen in shown.items():
        lines = _lines(folder, layer, head)
        order = [(each.interval, each.text) for each in chosen]
        found = (
            [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if chosen else []
        )
        found.sort(key=lambda line: order.index((line["interval"], line["sequence_id"])))
        _write(folder / "heads" / f"L{layer}H{head}.json", _head(corpus, model, layer, head, found))
        lines.unlink(missing_ok=True)


def _lines(folder: Path, layer: int, head: int) -> Path:
    return folder / f"L{layer}H{head}.lines"


def _chosen(corpus: Corpus, row: int, head: int) -> list[Shown]:
    """The texts of one head, the lowest interval first: some of the sample, and in the last one the strongest."""
    state = corpus.state
    largest = state.sampled[:, row, head]
    at = np.arange(1, INTERVALS) * len(largest) / INTERVALS
    ends = np.sort(largest)[np.minimum(np.rint(at).astype(int), len(largest) - 1)] if len(largest) else []
    place = np.searchsorted(ends, largest, side="right")
    found = [
        Shown(int(state.sample[i]), interval + 1, float(largest[i]))
        for interval in range(INTERVALS - 1)
        for i in np.flatnonzero(place == interval)[:IN_INTERVAL]
    ]
    weight = NAMES.index("weight")
    strongest = zip(
        state.top_text[weight, row, head].tolist(), state.top_value[weight, row, head].tolist(), strict=True
    )
    return [*found, *(Shown(text, INTERVALS, value) for text, value in strongest if text >= 0)][
        : len(found) + IN_TOP
    ]


def _sparse(weights: np.ndarray, keys: np.ndarray, length: int) -> dict[str, list[Any]]:
    """The kept pairs of one head, by row and key; an index is query · length + key."""
    query, place = np.nonzero((weights >= LEAST) & (keys >= 0))
    flat = query * length + keys[query, place]
    order = np.argsort(flat)
    values = weights[query, place][order].astype(np.float64).round(4)
    return {"attention_indices": flat[order].tolist(), "attention_values": values.tolist()}


def _head(corpus: Corpus, model: HookedModel, layer: int, head: int, sequences: list[Any]) -> dict[str, Any]:
    row = corpus.layers.index(layer)
    mass = corpus.state.distances[row, head] * FRACTION
    last = max(int(np.nonzero(mass)[0].max(initial=0)) + 1, 13)  # the pipeline's own bins end at 4,096
    counts = corpus.state.activation[row, head]
    ends = np.linspace(0, 1, ACTIVATION_BINS + 1)
    middle = float((counts * (ends[:-1] + ends[1:]) / 2).sum() / max(counts.sum(), 1))
    return {
        "sequences": sequences,
        "qk_distance_histogram": {
            "bin_edges": DISTANCES[: last + 1].astype(int).tolist(), "bin_values": mass[:last].round(4).tolist(),
        },
        "top_query_tokens": list(_tokens(corpus, model, row, head, "given")),
        "top_key_tokens": list(_tokens(corpus, model, row, head, "taken")),
        "histogram": {"bin_edges": ends.round(4).tolist(), "bin_values": counts.tolist()},
        # from the histogram, so to half of a bin
        "statistics": {"n_samples": len(sequences), "mean_max_activation": round(middle, 2)},
    }  # fmt: skip


def _tokens(corpus: Corpus, model: HookedModel, row: int, head: int, table: str) -> Iterator[dict[str, Any]]:
    mass = getattr(corpus.state, table)[:, row, head]
    for at in np.argsort(-mass, kind="stable")[:TOKENS]:
        word = model.tokenizer.decode([int(corpus.state.vocabulary[at])])  # type: ignore[union-attr]
        yield {"token": word, "weight": round(float(mass[at] * FRACTION), 4)}
