"""The pages, in the order of the menu; a page's name is its path in the address."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

VIEWS = Path(__file__).parent / "views"


@dataclass(frozen=True)
class Entry:
    icon: str
    asks: str  # the question that the page answers


PAGES = {
    "start": Entry("home", "Where to begin"),
    "heads": Entry("grid_view", "Which heads matter for the measure?"),
    "head": Entry("center_focus_strong", "Where does one head look, why, and what does it write?"),
    "flow": Entry("water", "From which tokens does an answer come?"),
    "sinks": Entry("south", "Where does attention drain?"),
    "circuits": Entry("account_tree", "Which heads work together?"),
    "edit": Entry("tune", "What happens when attention is changed?"),
    "compare": Entry("compare", "What differs between two runs?"),
    "experiments": Entry("science", "What was saved, and does it still hold?"),
    "catalogue": Entry("menu_book", "Every analysis"),
}
FIRST = "start"
# pages of the run that is shown, whose heads may be another model's
OF_SHOWN = ("heads", "head", "flow", "sinks")


def page(name: str) -> st.Page:
    return st.Page(
        VIEWS / f"{name}.py",
        title=name.capitalize(),
        url_path=None if name == FIRST else name,  # the first page is the root
        icon=f":material/{PAGES[name].icon}:",
        default=name == FIRST,
    )


def every_page() -> list[st.Page]:
    return [page(name) for name in PAGES]
