"""The README's program prints what the README says, and what it links to exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.slow
def test_the_program_prints_what_is_printed_below_it() -> None:
    found = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", README, re.DOTALL)
    assert found is not None
    program, told = found.groups()
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert NUMBER.sub("#", run.stdout) == NUMBER.sub("#", told)
    numbers = [float(text) for text in NUMBER.findall(run.stdout)]
    # two digits are printed, and another processor may round the last one otherwise
    assert numbers == pytest.approx([float(text) for text in NUMBER.findall(told)], abs=0.011)


def test_links_and_folders_exist() -> None:
    named = [*re.findall(r"\]\(([^)]+)\)", README), *re.findall(r"`([a-z]+/(?:[a-z-]+\.md)?)`", README)]
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_commands_of_the_readme_are_understood(tmp_path: Path) -> None:
    home = {**os.environ, "HOME": str(tmp_path)}  # shell completion writes into the home folder
    for line in re.findall(r"^headwater (?!doctor|models add).*$", README, re.MULTILINE):
        # the shell stays above the command, as a user's does: completion asks which shell that is
        command = f"'{sys.executable}' -m {line}\nexit $?"
        run = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=home
        )
        assert run.returncode == 0, (line, run.stderr)
    assert (tmp_path / "rollout.html").stat().st_size > 1_000_000
