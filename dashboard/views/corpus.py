"""Corpus: what every head does over the texts of a corpus, found by any statistic; one address for each head."""

import streamlit as st

from headwater.analyses._corpora.result import NOT_FOR
from headwater.dashboard.parts import corpora as parts
from headwater.dashboard.state import bound, corpora, session
from headwater.dashboard.widgets import plain

state = session.current()
names = corpora.offered()

st.header("Corpus")
with st.container(horizontal=True, vertical_alignment="bottom"):
    name = names[0] if len(names) == 1 else bound.choice(state, "corpus.file", "Corpus", names, names[0])
    found = corpora.corpus(name)
    by, head = parts.choose(state, found)
told = found.state.told
ready = "" if found.complete else " It is not finished, or a shard of several."
st.caption(
    plain(f"{name}: {found.run['model']} over {told['texts']:,} texts, {told['tokens']:,} tokens.{ready}")
)
parts.draw_finder(state, found, by, head)
st.subheader(f"Head {head[0]}.{head[1]}")
parts.draw_head(found, by, head)
parts.draw_examples(found, by, head)
st.caption(plain(f"Not for: {NOT_FOR}."))
