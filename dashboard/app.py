"""The dashboard: a sidebar with model, prompt and head, and one page per question.

Streamlit runs this file from the top on every change. A wrong prompt or edit is told in one line and stays where it
was typed; any other fault ends in Streamlit's own short message, without internals.
"""

import streamlit as st

from headwater.dashboard import pages, runs, sidebar
from headwater.dashboard.state import current, write_address
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError

st.set_page_config(page_title="Headwater", page_icon="💧", layout="wide")
st.html("<style>.stMainBlockContainer{padding-top:2.6rem;padding-bottom:2rem}</style>")
page = st.navigation({"Headwater": pages.every_page()})
state = current(runs.offered())
try:
    with st.sidebar:
        sidebar.draw(state)
    write_address(state)
    for notice in state.notices:
        st.warning(plain(notice))
    state.notices.clear()
    page.run()
except HeadwaterError as error:
    st.error(plain(str(error)), icon=":material/error:")
