"""The cards of the first page."""

from __future__ import annotations

import numpy as np
import streamlit as st

import headwater as hw
from headwater.dashboard import pages
from headwater.dashboard.canvas.grid import grid
from headwater.dashboard.figures.small_bars import small_bars
from headwater.dashboard.parts.job import fitting
from headwater.dashboard.parts.scores import found as scores
from headwater.dashboard.running import glance, models
from headwater.dashboard.running.measure import Measure, quoted
from headwater.dashboard.running.runs import Run, edits_of
from headwater.dashboard.running.sinks import KEEP
from headwater.dashboard.state import workspace
from headwater.dashboard.state.address import from_address, to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.records.free_memory import free_memory

RECENT = 6
HEIGHT = 200  # of the heads, in pixels of the page


def fits(model: hw.HookedModel, chosen: Measure) -> str:
    """What the pages can say of this model, in one line."""
    told = f"Every page measures {chosen.label}."
    if chosen.kind == "likeness":
        told = (
            f"{model.name} predicts no token and no class: every page measures how like its last hidden states are to "
            "those of the plain run. Logits, circuits of an answer and generated text have no meaning for it."
        )
    elif chosen.kind == "match":
        told = f"{model.name} compares a text and a picture: every page measures their similarity."
    elif not model.causal:
        told += f" {model.name} generates no text."
    return plain(told)


def heads(state: State, run: Run, chosen: Measure) -> None:
    name = quoted(run.label(chosen.answer)) if chosen.answer is not None else "the answer"
    st.subheader(f"Which heads make {name}?" if chosen.answer is not None else "Which heads matter?")
    found = scores(state, run, ["ablation"]).get("ablation")  # the same job as that of the page Heads
    if found is not None:
        found = found["effect"]
        place = np.unravel_index(int(np.nanargmax(found.values)), found.shape)
        layer = int(found["layer"].values[place[0]])
        head = (layer, int(place[1]))
        event = grid(
            found, chosen.unit, title="What each head is worth", chosen=head, height=HEIGHT, key="card_heads"
        )
        if event is not None and "head" in event:
            _go(state, "head", layer=event["head"][0], head=event["head"][1])
        most = float(found.values[place])
        way = "falls" if chosen.better > 0 else "rises"
        st.markdown(plain(f"Without head {layer}.{place[1]} the measure {way} by {most:.3g} {chosen.unit}."))
        _open(state, "heads", "Look at the heads", layer=layer, head=int(place[1]))


def sinks(state: State, run: Run, chosen: Measure) -> None:
    st.subheader("Where does attention drain?")
    found = glance.sink(run)
    name = quoted(run.keys[found.place])
    largest = ", ".join(f"{run.keys[n]} {found.share[n]:.2f}" for n in np.argsort(-found.share)[:3])
    alt = f"Share of attention by token; largest: {largest}"
    st.markdown("**Share received**")
    st.html(small_bars(found.share, run.keys, "share", alt))
    many = (
        f"{len(found.heads)} of {len(run.layers) * run.n_heads} heads give {name} more than {found.limit:.0%}"
    )
    st.markdown(
        plain(f"{many}; it receives {found.share[found.place]:.0%} of the attention that can see it.")
    )
    _open(state, "sinks", "Look at the sinks")


def edit(state: State, run: Run, chosen: Measure) -> None:
    st.subheader("What if it did not?")
    sink = glance.sink(run)
    name = quoted(run.keys[sink.place])
    if not sink.heads:
        st.caption(
            plain(f"No head gives {name} more than {sink.limit:.0%}, so there is no sink to take away.")
        )
        _open(state, "edit", "Change attention")
        return
    key = ("without-sink", run.identity, chosen.key)
    work = lambda: glance.without(state, sink.edit)  # noqa: E731
    found = fitting(key, work, "the run without the sink", model=state.model, lane="light")
    if found is not None and None not in found:
        before, after = found
        st.markdown(
            plain(f"{1 - KEEP:.0%} of what {len(sink.heads)} heads put on {name} goes to other tokens:")
        )
        st.metric(
            plain(chosen.label),
            f"{after:.4g} {chosen.unit}",
            f"{after - before:+.4g}",
            help=f"{before:.4g} as it is",
        )
        _open(state, "edit", "Change attention", edits=[state.on_part(sink.edit)], shown="b")


def own_model() -> None:
    with st.expander("A model of your own"):
        st.markdown(
            "`headwater dashboard FOLDER` opens a model folder of Hugging Face, `headwater dashboard HUB_ID` one "
            "of the hub; `headwater models add NAME` fetches a small trained one. Nothing leaves this machine."
        )
        rows = [(name, size) for name in models.offered() if (size := models.weights_on_disk(name))]
        # a table of markdown: one that scrolls would bring a megabyte to the first view
        lines = [f"| {plain(name)} | {size / 1e6:.1f} |" for name, size in rows]
        st.markdown("\n".join(["| model | weights on disk, MB |", "| :-- | --: |", *lines]))
        free = free_memory()
        st.caption(
            "A model takes about its weights in memory, twice that where they are stored in half precision and run in "
            f"full. {free / 1e9:.1f} GB are free here."
        )


def recent(state: State) -> None:
    """Views that were too long for an address, the latest first; none of a record that a visitor uploaded."""
    names = workspace.names("views")[:RECENT]
    if not names:
        return
    with st.expander("Recent long views"):
        for name in names:
            held = from_address({"view": name}, models.offered(), edits_of)
            own = (held.model, held.b_model or "")
            if not held.notices and not any(name.startswith(workspace.RECORD) for name in own):
                words = f"{held.model}: {held.text[:60]}"
                st.page_link(pages.page("edit"), label=plain(words), query_params={"view": name})


def _open(state: State, page: str, label: str, **changes: object) -> None:
    """A link to a page with some of the state changed."""
    address = _address(state, changes)
    st.page_link(pages.page(page), label=label, icon=":material/arrow_forward:", query_params=address)


def _go(state: State, page: str, **changes: object) -> None:
    st.switch_page(pages.page(page), query_params=_address(state, changes))


def _address(state: State, changes: dict[str, object]) -> dict[str, str]:
    return to_address(State(**{**vars(state), **changes, "notices": []}))
