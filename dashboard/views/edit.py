"""Edit: change attention or heads and see prediction, loss and attention before and after, side by side."""

import pandas as pd
import streamlit as st

from headwater.dashboard import edit_form, experiment, export, runs, scores
from headwater.dashboard.figures.difference import difference_map
from headwater.dashboard.figures.pattern import pattern_map
from headwater.dashboard.figures.pooling import MOST_CELLS
from headwater.dashboard.figures.tokens import next_token_bars
from headwater.dashboard.runs import Run
from headwater.dashboard.state import KEY, State
from headwater.dashboard.widgets import chart, downloads, numbers, plain, quoted
from headwater.lens.errors import HeadwaterError

NUMBER = st.column_config.NumberColumn(format="%.4f")
CHANGE = st.column_config.NumberColumn(format="%+.4f")


def list_edits(state: State) -> None:
    """The edits in force, in order, each with a button that removes it."""
    st.markdown("**Edits in force**")
    if not state.edits:
        st.info("None yet. Add one on the left, and everything below shows before and after.")
    for place, edit in enumerate(runs.edits_of(state.edits)):
        text, button = st.columns([8, 1], vertical_alignment="center")
        text.code(edit.to_python(), language="python", wrap_lines=True)
        if button.button("", icon=":material/close:", key=f"remove-{place}", help="Remove this edit"):
            del state.edits[place]
            st.rerun()
    if len(state.edits) > 1 and st.button("Remove all", key="remove-all"):
        state.edits.clear()
        st.rerun()


def draw_measures(table: pd.DataFrame, before: Run, after: Run) -> None:
    """Loss and the likeliest token of the unedited run, before and after."""
    columns = st.columns([3, 3, 4])
    columns[0].metric("Loss before, nats", _number(before.loss), help="mean next-token loss on this prompt")
    change = None if before.loss is None or after.loss is None else f"{after.loss - before.loss:+.4f}"
    columns[1].metric("Loss after, nats", _number(after.loss), change, delta_color="inverse")
    likeliest = table.iloc[0]
    columns[2].metric(
        f"Probability of {plain(quoted(str(likeliest['token'])))}",
        f"{likeliest['after']:.4f}",
        f"{likeliest['change']:+.4f}",
        help="the likeliest next token before the edits, now after them",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def draw_bars(table: pd.DataFrame) -> None:
    figure = next_token_bars(list(table["token"]), table["before"].to_numpy(), table["after"].to_numpy())
    chart(figure, "next-both", "Probabilities of the next tokens before and after the edits")


def draw_table(table: pd.DataFrame) -> None:
    shown = {"id": None, "before": NUMBER, "after": NUMBER, "change": CHANGE}
    alt = "Probabilities of the next tokens before and after the edits"
    st.dataframe(table, hide_index=True, column_config=shown, key="next-table", alt=alt)
    downloads("next-tokens-before-after", table, "next-both")


def draw_attention(state: State, before: Run, after: Run) -> None:
    st.subheader(f"Attention of head {state.layer}.{state.head}")
    if before.length > MOST_CELLS:
        st.caption(f"Maps are compared up to {MOST_CELLS} tokens; this prompt has {before.length}.")
        return
    exclude = st.toggle(
        "Leave position 0 out of the colour scale",
        key="exclude-first-edit",
        help="Shows the structure under a strong sink. No number changes.",
    )
    maps = {}
    for column, word, run in zip(st.columns(2), ("before", "after"), (before, after), strict=True):
        maps[word] = runs.pattern(run, state.layer, state.head)
        figure = pattern_map(
            maps[word],
            run.tokens,
            run.tokens,
            word.capitalize(),
            received=scores.margins(run, state.layer, state.head)[0].values,
            row_margin=False,
            exclude_first=exclude,
        )
        with column:
            chart(figure, f"map-{word}", f"Attention of head {state.layer}.{state.head} {word} the edits")
    change = difference_map(maps["before"], maps["after"], before.tokens, before.tokens, "After minus before")
    chart(change, "map-change", f"Change of attention in head {state.layer}.{state.head}, after minus before")
    frame = export.pairs_before_after(maps["before"], maps["after"], before.tokens)
    numbers(f"attention-{state.layer}.{state.head}-before-after", frame, "map-numbers")


def draw_export(state: State, before: Run, after: Run) -> None:
    st.subheader("Take it away")
    st.caption("Python that repeats this run; the button at its corner copies it.")
    st.code(experiment.as_python(state.model, state.prompt, state.edits), language="python")
    data = experiment.as_data(state.model, state.prompt, state.edits, before, after)
    files = {
        "experiment": ("Download the experiment", experiment.as_experiment(state, before).to_json()),
        "edited-run": ("Download what it showed", export.to_json(data)),
    }
    st.caption("headwater experiment experiment.json runs it again and says whether the numbers agree.")
    for column, (name, (label, content)) in zip(st.columns(2), files.items(), strict=True):
        column.download_button(
            label, content, f"{name}.json", "application/json", key=f"{name}-json", on_click="ignore"
        )


def open_experiment() -> None:
    """Bring a downloaded experiment back: its model, prompt and edits."""
    file = st.session_state["experiment-file"]
    state: State = st.session_state[KEY]
    if file is None:
        return
    try:
        experiment.take(file.getvalue().decode("utf-8-sig", "replace"), state)
    except HeadwaterError as error:
        state.notices.append(str(error))
        return
    chosen = {"model": state.model, "prompt": state.prompt, "layer": state.layer, "head": state.head}
    st.session_state.update({f"chosen-{name}": value for name, value in chosen.items()})


state: State = st.session_state[KEY]
before = runs.base_run(state.model, state.prompt)
st.header("Edit")
form, active = st.columns([2, 3], gap="large")
with form:
    added = edit_form.draw(runs.resident(state.model), before)
    if added is not None:
        state.edits.append(added.to_dict())
        st.rerun()
with active:
    list_edits(state)
st.file_uploader("Open an experiment", "json", key="experiment-file", on_change=open_experiment)
if state.edits:
    after = runs.edited_run(state.model, state.prompt, state.edits)
    if not before.predicts:
        active.metric(
            "Similarity of the last hidden states",
            f"{runs.similarity(before, after):.4f}",
            help="mean cosine over the tokens, before against after; this model predicts no next token",
        )
    else:
        table = runs.next_tokens(state.model, before, after, count=6)
        with active:
            draw_measures(table, before, after)
            draw_bars(table)
        with form:
            draw_table(table)
    draw_attention(state, before, after)
    draw_export(state, before, after)
