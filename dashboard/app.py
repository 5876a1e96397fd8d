"""The dashboard: at the left pages, model and input; above each page the measure and the runs; one page per question.

Streamlit runs this file from the top on every change. A wrong prompt or edit is told in one line and stays where it
was typed; any other fault ends in Streamlit's own short message, without internals.
"""

import streamlit as st

from headwater.dashboard import frame, pages, sidebar
from headwater.dashboard.parts import job
from headwater.dashboard.running import held, models, runs
from headwater.dashboard.state import session
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError

st.set_page_config(page_title="Headwater", page_icon="💧", layout="wide")
st.html(f"<style>{frame.STYLE}</style>")
page = st.navigation(pages.every_page(), position="hidden")
job.begin(page.url_path)
state = session.begin(models.offered(), runs.edits_of)
name = page.url_path or pages.FIRST
late = st.container(key="late-notices")
try:
    with st.sidebar:
        sidebar.draw(state, name)
    with runs.later():
        if frame.draw(state, name):
            page.run()
except runs.Pending as pending:
    frame.draw_pending(pending.asked)
except HeadwaterError as error:
    if str(error) not in st.session_state.get(frame.TOLD, ()):
        st.error(plain(str(error)), icon=":material/error:")
finally:
    session.write(state)
    with late:
        frame.tell(state, name)
    held.tidy()
