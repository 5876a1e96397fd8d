"""What SECURITY.md says and no other test holds: what the dashboard keeps on the disk, and for whom.

Seen to fail with the folder made as any other, with the uploaded file kept as it came, and with a text of any length
kept.
"""

from __future__ import annotations

import io
import stat
from pathlib import Path

import pytest
import sense_folders
from PIL import Image

from headwater.dashboard.running.inputs import take_picture
from headwater.dashboard.state import workspace
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWATER_WORKSPACE", str(tmp_path / "given"))
    return tmp_path / "given" / "workspace"


def test_the_workspace_is_its_owners_alone(home: Path) -> None:
    workspace.keep("texts", b"a secret")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_picture_is_kept_without_the_metadata_of_its_file(home: Path) -> None:
    into, exif = io.BytesIO(), Image.Exif()
    told = b"taken at the house of somebody"
    exif[0x010E] = told.decode()
    sense_folders.photograph().save(into, "JPEG", exif=exif, icc_profile=told * 20, comment=told)
    assert into.getvalue().count(told) == 22
    name = take_picture(into.getvalue())
    kept = Image.open(home / "pictures" / name)
    kept.load()
    assert kept.info == {}


@pytest.mark.parametrize("kind", workspace.MOST_BYTES)
def test_what_is_kept_of_a_kind_is_bounded(kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workspace.MOST_IN_ALL, kind, 100)
    kept = workspace.keep(kind, b"a" * 60)
    workspace.keep(kind, b"a" * 60)  # the same once more takes nothing
    with pytest.raises(HeadwaterError, match=f"60 bytes of {kind} are kept in .*; delete some there"):
        workspace.keep(kind, b"b" * 60)
    assert [path.name for path in (home / kind).iterdir()] == [kept]


def test_a_short_text_stands_in_the_address_alone_and_a_long_one_under_its_digest(home: Path) -> None:
    assert to_address(State(model="m", text="a" * 400))["prompt"] == "a" * 400
    assert not home.exists()
    assert "prompt" not in to_address(State(model="m", text="a" * 401))
    assert [path.name for path in home.iterdir()] == ["texts"]
