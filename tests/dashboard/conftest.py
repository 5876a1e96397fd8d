"""A small random model on disk that the dashboard opens like a user's own."""

from __future__ import annotations

import pytest
from chromium import CHROMIUM
from sense_folders import save
from visits import Visitors, started
from word_models import word_model

VOCABULARY = "<bos> <unk> When Mary and John went to the store , gave a drink <s> </s> &lt; $x$ **b** =1+1"
WORDS = VOCABULARY.split()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> str:
    """Folder of a GPT-2 with 3 layers of 4 heads, a context of 700 and hostile words in its vocabulary."""
    return word_model(tmp_path_factory.mktemp("models") / "small", WORDS)


@pytest.fixture(autouse=True)
def own_workspace(tmp_path, monkeypatch) -> None:
    """Nothing is kept in the folder of the person who runs the tests."""
    monkeypatch.setenv("HEADWATER_WORKSPACE", str(tmp_path / "workspace"))


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """A page waits for its jobs, as the tests run no browser that would look again."""
    monkeypatch.setattr("headwater.dashboard.parts.job.PATIENCE", 200.0)


@pytest.fixture
def offered(small_model, monkeypatch) -> None:
    """The small model is offered, and no other."""
    from headwater.dashboard.running import models

    monkeypatch.setattr(models, "_given", {})
    monkeypatch.setattr(models, "embedded", dict)
    monkeypatch.setattr(models, "is_added", lambda name: False)
    models.allow(small_model)


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window, for tests marked `NEEDED`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def server(small_model, tmp_path_factory):
    """Address of a dashboard on the small model that offers a small T5 too."""
    t5 = save("t5", tmp_path_factory.mktemp("models") / "t5")
    with started(small_model, 8650, tmp_path_factory.mktemp("workspace"), str(t5)) as address:
        yield address


@pytest.fixture
def visit(browser, server):
    """`Visitors` who fail the test if their pages throw or ask anything of another machine."""
    visitors = Visitors(browser, server)
    yield visitors
    visitors.close()
    assert visitors.faults == []
