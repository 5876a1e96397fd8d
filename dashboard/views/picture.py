"""Picture: where a word looks on a picture, and which words look at a part of it."""

import streamlit as st

import headwater as hw
from headwater.dashboard import export, runs, seen
from headwater.dashboard.widgets import chart, numbers, plain

MEAN = "mean of the heads"

st.header("Picture")
names = seen.names()
if not names:
    st.info("No model that reads pictures is here: headwater models add dinov2-small.")
    st.stop()
left, right = st.columns([2, 3], gap="large")
with left:
    name = st.selectbox("Model that sees", names, key="picture-model")
    with st.spinner("Loading the model …"):
        model = runs.resident(name)
    samples = seen.samples(name)
    own = st.file_uploader("A picture of your own", type=list(seen.KINDS), key="picture-file")
    sample = (
        st.selectbox("Sample picture", list(samples), key=f"picture-sample-{name}", disabled=own is not None)
        if samples
        else None
    )
    if own is None and sample is None:
        st.info("Upload a picture to begin.")
        st.stop()
    image = seen.uploaded(own.getvalue()) if own is not None else samples[sample].image
    text = ""
    if model.tokenizer is not None:
        written = samples[sample].text if sample is not None else "<image>"
        text = st.text_input("Text", written, key=f"picture-text-{name}-{sample}", max_chars=2000)
    run = seen.of(name, text, image)
    part = st.selectbox("Part", list(run.records), key=f"picture-part-{name}")
    record = run.records[part]
    one, two = st.columns(2)
    with one:
        last = len(record.layers) - 1
        layer = st.selectbox("Layer", record.layers, last, key=f"picture-layer-{name}-{part}")
    with two:
        heads = [MEAN, *range(record.n_heads)]
        head = st.selectbox("Head", heads, key=f"picture-head-{name}-{part}")
    chosen = "all" if head == MEAN else f"{layer}.{head}"
told = f"layer {layer}, {MEAN}" if head == MEAN else f"head {layer}.{head}"
frames, rows, columns = run.grid(part)
with right:
    words = run.words(part)
    looking = words or run.patches(part)
    key = f"picture-word-{name}-{part}-{text}"
    asked = st.selectbox("Word" if words else "Patch", list(looking), index=len(looking) - 1, key=key)
    found = seen.word(run, part, looking[asked], layer, chosen)
    drawn = hw.on_grid(found) if frames > 1 else found
    image = None if frames > 1 else run.pixels
    figure = hw.figure(drawn, image=image, title=f"{asked.split(' ', 1)[1]!r}, {told}")
    chart(figure, "word-on-picture", f"Weights between {asked} and each patch")
    numbers("word-on-picture", export.table(found, "weight"), "word-numbers")
    if frames > 1 or not words:
        st.stop()
    st.subheader("From a region to the words")
    down = (
        st.slider("Rows of patches", 0, rows - 1, (0, rows - 1), key=f"picture-rows-{name}-{rows}")
        if rows > 1
        else (0, 0)
    )
    across = (
        st.slider(
            "Columns of patches", 0, columns - 1, (0, columns - 1), key=f"picture-columns-{name}-{columns}"
        )
        if columns > 1
        else (0, 0)
    )
    bars = seen.region(run, part, (down[0], across[0], down[1], across[1]), layer, chosen)
    place = f"rows {down[0]} to {down[1]}, columns {across[0]} to {across[1]}"
    chart(hw.figure(bars, title=f"Words of the region, {told}"), "region-words", f"Words of {place}")
    numbers("region-words", export.table(bars, "weight"), "region-numbers")
st.caption(
    plain(
        "A weight says where a head reads, not what it does with it. Rows of patches run from the top, from 0."
    )
)
