"""Heads: which heads matter for the measure, in a grid or against a second score, as maps and as a ranked table."""

from dataclasses import replace

import streamlit as st

from headwater.dashboard.parts import heads, scores as parts
from headwater.dashboard.running import effects, measure, runs, scores
from headwater.dashboard.state import bound, session
from headwater.dashboard.widgets import plain

THIS = "this input"
state = session.current()
first, run = runs.a(state), runs.shown(state)
other = runs.b(state) if state.shown != "a" else None
chosen = measure.of(state, first)
comparable = other is not None and (chosen.kind == "none" or chosen.value(other) is not None)
change = (
    state.shown == "difference" and other is not None and comparable
    and (other.layers, other.n_heads) == (first.layers, first.n_heads)
)  # fmt: skip

st.header("Heads")
if state.shown == "difference" and not change:
    st.info("Runs A and B have other heads or other answers, so there is no difference; this is run A.")
if run is other and not comparable:
    st.info("Run B has other answers than the measure, or none, so effects are left out.")
offered = scores.offered(run, chosen, parts.has_roles(run))
if run is other and not comparable:
    offered = {name: score for name, score in offered.items() if score.source != "effect"}
effect_names = [name for name, score in offered.items() if score.source == "effect"]

with st.container(horizontal=True, vertical_alignment="bottom"):
    name = bound.choice(
        state, "heads.score", "Score of a head", list(offered), next(iter(offered)),
        show=lambda each: offered[each].label, width=330,
    )  # fmt: skip
    view = bound.segments(state, "heads.view", "Drawn as", ["grid", "scatter"], "grid")
    across = None
    if view == "scatter":
        across = bound.choice(
            state,
            "heads.across",
            "Against",
            list(offered),
            "sink",
            show=lambda each: offered[each].label,
            width=300,
        )
    sets = effects.sets_of(runs.model_of(state)) if not run.part and effect_names else []
    over = ""
    if sets and chosen.kind in effects.OF_ANSWERS:
        of = bound.choice(
            state, "heads.over", "Effects over", [THIS, *sets], THIS, show=lambda each: each.replace("_", " "),
            width=190,
            help=f"a prompt set: {effects.EXAMPLES} examples, each with its own answer, and 95 % intervals",
        )  # fmt: skip
        over = "" if of == THIS else of
if over:
    # what is said of the effects: they are of no answer of this input
    chosen = replace(chosen, label=f"each example's own {measure.KINDS[chosen.kind]}")
    offered |= scores.effects_of(run, chosen)

if not over and sets and (mine := effects.set_of(run.name, state.text, runs.model_of(state))):
    words = mine.replace("_", " ")
    st.caption(
        plain(f"This prompt is an example of {words}: “Effects over {words}” gives means and intervals.")
    )
columns = [*effect_names, *(["role"] if parts.has_roles(run) else [])]
beside = bound.several(
    state, "heads.columns", "Columns of the table", columns,
    [each for each in ("ablation", "gradient", "direct", "role") if each in columns],
    show=lambda each: parts.BRIEF.get(str(each), str(each)),
)  # fmt: skip
wanted: list[str] = [
    *dict.fromkeys([name, *([across] if across else []), *[e for e in beside if e != "role"], "sink"])
]
wanted += ["roles"] if "role" in beside and parts.has_roles(run) else []
with st.container(key="heads-work"):  # the places of what follows stay as they are while jobs come and go
    there = parts.found(state, first if change else run, wanted, over)
    after = parts.found(state, other, wanted, over) if change and other is not None else None
if after is not None:
    there = {
        each: parts.plain(after[each]) - parts.plain(there[each])
        for each in wanted if each in there and each in after and each != "roles"
    }  # fmt: skip

left, right = st.columns(2, gap="medium")
with left:
    score = offered[name]
    if name in there and across is None:
        heads.draw_grid(state, run, parts.plain(there[name]), score, change)
    elif name in there and across is not None and across in there:
        heads.draw_scatter(
            state,
            run,
            (parts.plain(there[across]), offered[across]),
            (parts.plain(there[name]), score),
            change,
        )
    st.caption(plain(f"{score.meaning[0].upper()}{score.meaning[1:]}. Cost: {score.cost}."))
    if score.not_for:
        st.caption(plain(f"Not for: {score.not_for}."))
with right:
    heads.draw_mosaic(state, run)
heads.draw_actions(state, run)

frame = parts.ranked(there, run)
st.subheader(("Heads by their effect" if effect_names else "Heads") + (", B − A" if change else ""))
said = parts.agree(there)
count = (
    f"Means and 95 % intervals over {effects.EXAMPLES} examples of {over.replace('_', ' ')}. " if over else ""
)
told = (
    f"{count}Ranked by size; above 0 the head helps {chosen.label}."
    if effect_names
    else "Ranked by their share on the sink."
)
st.caption(plain(f"{told} {said}".rstrip()))
heads.draw_table(state, frame, offered)

if (
    effect_names
    and not change
    and bound.toggle(state, "heads.curve", "Pruning curve: the measure while heads go")
):
    heads.draw_curve(state, run, over, chosen.label, chosen.unit)
