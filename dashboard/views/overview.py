"""Overview: one number for every head, and what the model predicts. A click on a cell opens the head."""

import streamlit as st

from headwater.dashboard import export, pages, runs, scores
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.tokens import next_token_bars
from headwater.dashboard.state import KEY, State
from headwater.dashboard.widgets import chart, clicked, numbers

state: State = st.session_state[KEY]
run = runs.base_run(state.model, state.prompt)
choices = scores.offered(run)

st.header("Overview")
grid, prediction = st.columns([3, 2], gap="large")
with grid:
    name = st.selectbox(
        "Colour the heads by", list(choices), format_func=lambda key: choices[key].label, key="score"
    )
    score = choices[name]
    values = score.of(state.model, state.prompt)
    figure = head_grid(values, score.label, score.unit, score.limits(run), (state.layer, state.head))
    picked = clicked(figure, "heads", f"{score.label} of each head, layers down, heads across")
    st.caption(f"{score.meaning[0].upper()}{score.meaning[1:]}. Click a head to open it.")
    numbers(f"{name}-per-head", export.table(values, name), "overview-numbers")
with prediction:
    if not run.predicts:
        st.info("This model predicts no next token: it reads in both directions or has no language head.")
    else:
        table = runs.next_tokens(state.model, run)
        title = "Predicted next tokens"
        chart(
            next_token_bars(list(table["token"]), table["probability"].to_numpy(), title=title), "next", title
        )
        if run.loss is not None:
            st.metric(
                "Mean loss on this prompt",
                f"{run.loss:.4f} nats",
                help="mean over the tokens after the first",
            )
        numbers("next-tokens", table, "next-numbers")

if picked:
    state.choose_head(int(picked["y"]), int(picked["x"]))
    st.switch_page(pages.page("head"))
