"""`load`: open a model by a name that comes with Headwater, a local folder, a hub id, or from memory.

A model folder may come from a stranger. It is checked before transformers reads it (folder.py). No tensor may be
missing or left over: transformers would fill missing ones with random numbers. All weights must be finite. The loaded
model is then switched to Headwater's attention, and its outputs are compared with those before (opening.py).
"""

from __future__ import annotations

import difflib
import functools
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from headwater.lens.diffusion.opening import denoiser_of, is_pipeline, open_diffusion
from headwater.lens.diffusion.samples import is_diffusers
from headwater.lens.errors import ModelError, nearest
from headwater.lens.examples.processor import UnusableProcessor, of_pictures, of_sounds, processor_of
from headwater.lens.examples.settings_files import check_sizes, check_tokenizers
from headwater.lens.foreign.opening import open_module
from headwater.lens.loading import adapter_folder, adapters
from headwater.lens.loading.as_it_was import as_it_was
from headwater.lens.loading.folder import built, check, one_line
from headwater.lens.loading.joined import join, with_image_token
from headwater.lens.loading.opening import open_model
from headwater.lens.loading.pipeline_folder import is_pipeline_folder, open_pipeline
from headwater.lens.model import HookedModel
from headwater.lens.models import declared_rules
from headwater.lens.models.embedded import check_embedded, embedded
from headwater.lens.naming.texts import beginning, check_choice
from headwater.lens.trained.joined import PROJECTOR, Joined, joined
from headwater.lens.trained.registry import TRAINED, added_folder
from headwater.lens.transformer_lens.bridge import is_bridged, tokenizer_of, unbridged

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
HUB_SECONDS = 5  # timeout for the hub to answer; the download has no timeout
NEAR = 0.6  # a name this similar to a known one counts as a typing error
# one model at a time: while transformers builds one, it exchanges functions and the default dtype of torch for the
# whole process; downloads do not wait
_building = threading.RLock()
Given = ParamSpec("Given")


def _alone(function: Callable[Given, HookedModel]) -> Callable[Given, HookedModel]:
    """The function, which waits until no other thread builds a model."""

    @functools.wraps(function)
    def waiting(*args: Given.args, **kwargs: Given.kwargs) -> HookedModel:
        with _building:
            return function(*args, **kwargs)

    return waiting


def load(
    source: str | os.PathLike[str] | nn.Module, tokenizer: Any = None, *, dtype: Any = None,
    prepend_bos: bool | None = None, sample: Any = None, axes: Mapping[str, Any] | None = None,
    processor: Any = None,
    base: str | os.PathLike[str] | None = None,
) -> HookedModel:  # fmt: skip
    """Open a model.

    `source` is one of: an embedded name, or that of a trained model that `headwater models add` keeps (`headwater
    models` lists both; a local folder of that name is given as ./name); a local folder; a hub id; a transformers model
    in memory, also with adapters of peft (a PeftModel: its adapters stay unmerged and active) or with weights of 8 or 4
    bits; a TransformerBridge. A model in memory is put into eval mode and its attention runs through Headwater
    from then on; its weights are not changed. A bridge is not changed: the model inside is rebuilt beside it on the
    same weights. Without a `tokenizer` (folders usually bring one) prompts are token ids. `dtype` (default float32)
    applies to models read from disk. `prepend_bos` says whether a text begins with the token for it: True puts it in
    front (as TransformerLens does), False leaves it out, None does what the tokenizer does; `model.first_token` and the
    attributes of every result say which token is the first. `sample` is a small input, {name: tensor} as
    transformers names them, for a model that takes none of those that Headwater tries on it. `processor` makes inputs
    of pictures and sounds; a folder that brings one needs none. A folder may be an
    adapter's; its base model is the folder that its configuration names, or `base`, a folder or such a name.
    ModelError says why a model can not be found, trusted or read exactly.

    Any other `torch.nn.Module` opens too if its attention calls `scaled_dot_product_attention`: `sample` is then what
    its `forward` takes, a tensor, a tuple or a dictionary, and `axes` may name its tokens, as in `{"self": {"image":
    (rows, columns)}}` (`lens/foreign/`). A module of diffusers needs no sample where its configuration says what it
    takes, and a pipeline of diffusers is opened by its denoiser (`lens/diffusion/`). A folder of a small text-to-image
    model in pixels opens with its pipeline (`lens/loading/pipeline_folder.py`).

    >>> import headwater as hw
    >>> hw.load("tasks-4l")
    HookedModel('tasks-4l', LlamaForCausalLM, 4 layers × 8 heads, d_model 256, first token '<bos>')
    """
    check_choice(prepend_bos, ModelError)
    if tokenizer is not None and not callable(tokenizer):
        raise ModelError(
            f"tokenizer is a tokenizer of transformers; got {tokenizer!r:.60}; give AutoTokenizer.from_pretrained(…)"
        )
    if is_pipeline(source):
        denoiser = denoiser_of(source)
        with _building, as_it_was(denoiser):
            return open_diffusion(denoiser, sample, axes, source)
    if is_foreign(source):
        with _building, as_it_was(source):
            return (open_diffusion if is_diffusers(source) else open_module)(source, sample, axes)
    if axes is not None:
        raise ModelError(
            "axes= names the tokens of a module outside transformers; leave it out for any other source"
        )
    if sample is not None and not isinstance(sample, Mapping):
        raise ModelError(
            f"the sample of a transformers model is {{name: tensor}}; got {type(sample).__name__}"
        )
    if processor is not None and of_pictures(processor) is None and of_sounds(processor) is None:
        raise ModelError(
            f"processor is a processor of transformers; got {processor!r:.60}; give AutoProcessor.from_pretrained(…)"
        )
    if tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None)
    model = _opened(source, tokenizer, dtype, sample, base)
    if processor is not None:
        model.processor = processor
    if prepend_bos and beginning(model.tokenizer) is None:
        raise ModelError(
            f"prepend_bos=True: the tokenizer of {model.name} has no token that begins a text; leave it out"
        )
    model.prepend_bos = prepend_bos
    return model


def is_foreign(source: Any) -> TypeGuard[nn.Module]:
    """Whether a source is a module that transformers does not know."""
    known = isinstance(source, PreTrainedModel) or isinstance(
        getattr(source, "_orig_mod", None), PreTrainedModel
    )
    return (
        isinstance(source, nn.Module)
        and not known
        and not is_bridged(source)
        and not adapters.is_adapted(source)
    )


def _opened(
    source: str | os.PathLike[str] | nn.Module, tokenizer: Any, dtype: Any, sample: Mapping[str, Any] | None,
    base: str | os.PathLike[str] | None,
) -> HookedModel:  # fmt: skip
    if base is not None and not (
        isinstance(source, str | os.PathLike) and adapter_folder.is_adapter(Path(source).expanduser())
    ):
        raise ModelError("base= is the model of an adapter's folder; leave it out for any other source")
    if isinstance(source, nn.Module) or is_bridged(source):
        return _in_memory(source, tokenizer, sample)
    if isinstance(source, HookedModel):
        raise ModelError(f"{source.name} is open already; use it as it is, or give source.hf to open it anew")
    if not isinstance(source, str | os.PathLike):
        raise ModelError(
            f"load takes a name, a folder or a model of transformers; got {type(source).__name__}"
        )
    name = os.fspath(source)
    if not isinstance(name, str) or not name.strip():
        raise ModelError("the name of the model is empty; `headwater models` lists those that there are")
    known = embedded()
    if name in known:
        check_embedded(name)
        return _from_folder(known[name]["path"], tokenizer, name, dtype, sample)
    if name in TRAINED:
        return _from_folder(_added(name), tokenizer, name, dtype, sample)
    if name in joined():
        return _joined(joined()[name], tokenizer, dtype)
    path = Path(name).expanduser()
    if adapter_folder.is_adapter(path):
        return _from_folder(_base(path, base), tokenizer, path.resolve().name, dtype, sample, adapter=path)
    if path.exists():
        return _from_folder(path, tokenizer, path.resolve().name, dtype, sample)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"no folder or file is named {name}; give one that exists, a hub id, or a name in `headwater models`"
        )
    return _from_hub(name, tokenizer, dtype, sample)


@_alone
def _in_memory(source: Any, tokenizer: Any, sample: Mapping[str, Any] | None) -> HookedModel:
    if is_bridged(source):
        hf = unbridged(source)
        known_tokenizer = tokenizer_of(source) if tokenizer is None else tokenizer
        return open_model(hf, known_tokenizer, type(hf).__name__, sample)
    if adapters.is_adapted(source):
        source = adapters.adapted(source)
    if isinstance(source, PreTrainedModel):
        adapters.refuse_changed_attention(source)
        return open_model(source, tokenizer, type(source).__name__, sample)
    raise ModelError(
        f"{type(getattr(source, '_orig_mod', source)).__name__} is wrapped by torch.compile; load() the model itself"
    )


def _added(name: str) -> Path:
    """The folder of a trained model in the cache."""
    try:
        return added_folder(name)
    except ModelError as error:
        if Path(name).exists():
            raise ModelError(f"{error}; the folder {name} here is ./{name}") from None
        raise


@_alone
def _joined(model: Joined, tokenizer: Any, dtype: Any) -> HookedModel:
    """A vision–language model of two that were added."""
    folders = [check(folder) for folder in model.folders()]
    check_embedded(model.name)
    with one_line(f"{model.name} can not be loaded"):
        language, tower = (built(folder, dtype)[0] for folder in folders)
        tokenizer = with_image_token(_tokenizer(folders[0].path)) if tokenizer is None else tokenizer
        opened = open_model(join(model.path, language, tower), tokenizer, model.name)
    opened.processor = processor_of(model.path)
    opened.weights_digest.files = (
        *(file for each in folders for file in each.weights),
        model.path / PROJECTOR,
    )
    return opened


def _base(path: Path, named: str | os.PathLike[str] | None) -> Path:
    """The folder of an adapter's base model."""
    if named is None:
        return adapter_folder.base_of(path)
    if isinstance(named, str) and (known := embedded().get(named)) is not None:
        check_embedded(named)
        return known["path"]
    if isinstance(named, str) and named in TRAINED:
        return _added(named)
    if isinstance(named, str | os.PathLike) and (folder := Path(named).expanduser()).is_dir():
        return folder
    told = repr(named) if isinstance(named, str | os.PathLike) else f"a {type(named).__name__}"
    raise ModelError(f"base is a folder or a name that `headwater models` lists; got {told:.100}")


def _from_hub(name: str, tokenizer: Any, dtype: Any, sample: Any) -> HookedModel:
    """Open a hub id; huggingface_hub downloads only safetensors and text files into its cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    known = [*embedded(), *TRAINED, *joined()]
    near = "/" not in name and bool(difflib.get_close_matches(name, known, n=1, cutoff=NEAR))
    folder = _cached(name) if near or constants.HF_HUB_OFFLINE else None
    why = "not looked for on the hub, so near is it to another" if near else "HF_HUB_OFFLINE is set"
    try:
        if folder is None and not near and not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(
                name, timeout=HUB_SECONDS
            )  # asks first, because the download would wait far longer for an answer
            folder = snapshot_download(name, allow_patterns=WANTED)
    except (
        Exception
    ) as error:  # the hub client raises many kinds; after any of them the model is not available
        folder, why = _cached(name), type(error).__name__
    if folder is None:
        hint = f"; {nearest(name, known)}" if "/" not in name else ""
        raise ModelError(
            f"no known model, folder or reachable hub model is called {name!r} ({why}){hint}; without a network "
            "give a local folder"
        )
    return _from_folder(Path(folder), tokenizer, name, dtype, sample)


def _cached(name: str) -> Path | None:
    """The snapshot of a hub id in the local cache; None without one."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except Exception:  # not cached, or not a valid id
        return None


@_alone
def _from_folder(
    path: Path, tokenizer: Any, name: str, dtype: Any, sample: Any, adapter: Path | None = None
) -> HookedModel:  # fmt: skip
    if adapter is None and is_pipeline_folder(path):
        if tokenizer is not None or sample is not None:
            raise ModelError(f"{name} is a pipeline, which has its own; leave tokenizer= and sample= out")
        return open_pipeline(path, name, dtype)
    folder = check(path)
    with one_line(f"{path} can not be loaded"):
        hf, report = built(folder, dtype)
        _refuse_incomplete(path, hf, report)
        if adapter is not None:
            hf = adapter_folder.put_on(hf, adapter)
            tokenizer = _tokenizer(adapter) if tokenizer is None else tokenizer
        tokenizer = _tokenizer(path) if tokenizer is None else tokenizer
        model = open_model(hf, tokenizer, name, sample)
        # after the comparison with transformers' own attention, which does not know these rules
        declared_rules.attach(model, path)
    try:
        model.processor = processor_of(path) or model.processor
    except ModelError as error:
        model.processor = UnusableProcessor(str(error))
    model.weights_digest.files = tuple(folder.weights) if adapter is None else ()
    return model


def _refuse_incomplete(folder: Path, hf: Any, report: dict[str, Any]) -> None:
    faults = {"missing": "lack", "mismatched": "have shapes that do not fit", "unexpected": "have unknown"}
    for kind, what in faults.items():
        found = report.get(f"{kind}_keys", ())
        if names := sorted(str(item[0] if isinstance(item, tuple) else item) for item in found):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the weights in {folder} {what} {', '.join(names[:3])}{more} for {type(hf).__name__}; the file does "
                "not belong to this config"
            )


def _tokenizer(folder: Path) -> Any:
    if not any(
        (folder / n).is_file()
        for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    ):
        return None
    check_sizes(folder)
    check_tokenizers(folder)
    with one_line(f"the tokenizer in {folder} can not be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
