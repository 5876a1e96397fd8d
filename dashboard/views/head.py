"""Head: where one head looks, why it looks there, what it writes about the measure, and whether that is typical."""

import streamlit as st

from headwater.dashboard.parts import attention, picture, reading, records
from headwater.dashboard.parts.token_choice import choose_token
from headwater.dashboard.running import measure, runs
from headwater.dashboard.state import bound, session

state = session.current()
run = runs.shown(state)
one, other = runs.a(state), runs.b(state) if state.shown == "difference" else None

with st.container(horizontal=True, vertical_alignment="bottom"):
    st.header(f"Head {state.layer}.{state.head}", width="content")
    bound.choice(state, "layer", "Layer", run.layers, state.layer, width=110)
    bound.choice(state, "head", "Head", list(range(run.n_heads)), state.head, width=110)
    name = f"{state.layer}.{state.head}"
    pinned = name in state.pins
    if st.button("Unpin" if pinned else "Pin", icon=":material/push_pin:", key="pin-head"):
        state.pin(name)
        session.again()

if state.shown == "difference" and other is not None and reading.same_tokens(one, other):
    left, right = st.columns(2)
    with left:
        attention.draw_head(state, one, "mapA", state.layer, state.head, f"Head {name}: A")
    with right:
        attention.draw_head(state, other, "mapB", state.layer, state.head, f"Head {name}: B")
    attention.draw_difference(state, one, other, "change", state.layer, state.head)
else:
    attention.draw_head(state, run, "map", state.layer, state.head)
    if other is not None and reading.same_heads(one, other):
        attention.draw_difference(state, one, other, "change", state.layer, state.head)
        st.caption(
            "B − A where both texts have a token, the same or one in the place of another; hatched where B has none. "
            "The page Compare shows both maps."
        )
    elif other is not None:
        st.info("Runs A and B have other heads, so there is no difference of their maps; this is run A.")
st.caption(
    "Click a pair, drag over a window for its exact weights, walk with the arrow keys (with Shift: to other heads). "
    "Above: the share that each key receives; right: the entropy of each query; both exact and over the whole input."
)

reading.draw_others(state, run)
query = len(run.queries) - 1 if state.query is None else min(state.query, len(run.queries) - 1)
with st.container(horizontal=True, vertical_alignment="bottom"):
    choose_token(state, "query", "Token that looks", run.queries, query, width=260)
    if not run.of_record:
        reading.draw_cell(state, run, query)
reading.draw_row(state, run, query)
picture.draw(state, run, query)
if run.of_record:
    records.draw_needs(run.name, "why it looks there, what it writes, and whether it is typical")
else:
    reading.draw_why(state, run, query)
    reading.draw_writes(state, run, measure.of(state, one))
    reading.draw_typical(state, run)
