"""What is checked before Headwater is built: that the links of headwater/ are links."""

from __future__ import annotations

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LINKS = ("kernels", "lens", "analyses", "dashboard", "data")


class LinksAreLinks(BuildHookInterface):
    """Refuses a checkout in which git wrote the links as text files, as it does on Windows by default."""

    def initialize(self, version: str, build_data: dict[str, object]) -> None:
        broken = [name for name in LINKS if not (Path(self.root) / "headwater" / name).is_dir()]
        if broken:
            raise SystemExit(
                f"headwater/{broken[0]} is a file and not a link to ../{broken[0]}: this clone was made without "
                "symbolic links. Clone again with: git clone -c core.symlinks=true URL (on Windows, turn on "
                "Developer Mode first)."
            )
