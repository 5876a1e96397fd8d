"""Compare: one view of runs A and B side by side, with one selection and aligned tokens."""

import streamlit as st

from headwater.dashboard.parts import compare as parts
from headwater.dashboard.running import compare, measure, runs
from headwater.dashboard.state import session

state = session.current()
one, other = runs.a(state), runs.b(state)

st.header("Compare")
if other is None:
    st.info(
        "There is one run. Give run B another text or another model at the top, or change attention on the page Edit; "
        "both runs then stand here side by side."
    )
else:
    places = compare.aligned(one.keys, other.keys)
    parts.draw_told(one, other, measure.of(state, one), places)
    view, swapped = parts.choose(state)
    sides = [("A", one), ("B", other)]
    parts.draw(state, view, sides[::-1] if swapped else sides, places)
