"""`registry.py`: the entries, the place of the cache, and what opening a model that is not there says."""

import re
from pathlib import Path

import pytest

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.trained.registry import TRAINED, bytes_on_disk, cache_folder, is_added, megabytes


def test_every_entry_can_be_fetched_held_to_a_digest_and_said() -> None:
    for name, each in TRAINED.items():
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name)
        assert re.fullmatch(r"[\w.-]+==[\d.]+", each.package), "a version is pinned"
        assert all(
            re.fullmatch("[0-9a-f]{64}", digest) for digest in (each.weights, *(f.sha256 for f in each.files))
        )
        names = [Path(file.path).name for file in each.files]
        assert len(set(names)) == len(names)
        assert not any(Path(file.path).is_absolute() or ".." in Path(file.path).parts for file in each.files)
        assert each.source.startswith("https://")
        assert each.about
        assert each.licence
        assert 0 < each.download <= sum(file.size for file in each.files)


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "models"
    monkeypatch.setenv("HEADWATER_CACHE", "beside")
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / "beside" / "models"
    monkeypatch.setenv("HEADWATER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "headwater" / "models"


def test_what_was_not_added_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    for name, each in TRAINED.items():
        assert not is_added(name)
        assert bytes_on_disk(name) == 0
        text = (
            f"{name} has not been added; `headwater models add {name}` fetches it ({megabytes(each.download)}, "
            f"{each.licence})"
        )
        with pytest.raises(ModelError, match=f"^{re.escape(text)}$"):
            hw.load(name)


@pytest.mark.parametrize("typed", ["smollm2-135", "smolm2-135m", "dinov2-smal", "mini-lm"])
def test_a_typing_error_names_the_model_and_asks_no_hub(typed: str) -> None:
    with pytest.raises(
        ModelError, match=r"not looked for on the hub.*did you mean '(smollm2-135m|dinov2|minilm)"
    ):
        hw.load(typed)


def test_sizes_are_said_as_download_pages_do() -> None:
    assert [megabytes(size) for size in (92_871_040, 538_090_408, 1_200_000_000)] == [
        "93 MB",
        "538 MB",
        "1.2 GB",
    ]
