"""The pages, in the order of the menu; a page's name is its path in the address."""

from pathlib import Path

import streamlit as st

VIEWS = Path(__file__).parent / "views"
ICONS = {
    "overview": "grid_view",
    "head": "center_focus_strong",
    "flow": "water",
    "sinks": "south",
    "edit": "tune",
    "picture": "image",
}


def page(name: str) -> st.Page:
    return st.Page(
        VIEWS / f"{name}.py",
        title=name.capitalize(),
        url_path=None if name == "overview" else name,  # the first page is the root
        icon=f":material/{ICONS[name]}:",
        default=name == "overview",
    )


def every_page() -> list[st.Page]:
    return [page(name) for name in ICONS]
