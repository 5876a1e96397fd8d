"""The pages, in the order of the menu; a page's name is its path in the address."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from headwater.dashboard.state import corpora

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
OF_RESULTS = {"corpus": Entry("library_books", "What do heads do over thousands of texts?")}
FIRST = "start"
# pages of the run that is shown, whose heads may be another model's
OF_SHOWN = ("heads", "head", "flow", "sinks")
OF_BOTH = ("edit", "compare")  # show runs A and B beside each other, whichever is shown elsewhere


def shown() -> dict[str, Entry]:
    """The pages of the menu; that of corpora is there where a result was opened."""
    return PAGES | OF_RESULTS if corpora.offered() else PAGES


def page(name: str) -> st.Page:
    return st.Page(
        VIEWS / f"{name}.py",
        title=name.capitalize(),
        url_path=None if name == FIRST else name,  # the first page is the root
        icon=f":material/{(PAGES | OF_RESULTS)[name].icon}:",
        default=name == FIRST,
    )


def every_page() -> list[st.Page]:
    return [page(name) for name in shown()]
