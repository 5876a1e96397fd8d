"""Head relevance vectors on `t2i-digits`: which heads look at which word, and what leaves the picture without them."""

import sys
from pathlib import Path

import _drawn_digits as drawn
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import headwater as hw
from headwater.data.pictures.digits import WORDS

CONCEPTS = {
    "digit": f"bright {{{'|'.join(WORDS)}}} left",
    "brightness": "{bright|dim} three left",
    "place": "bright three {left|right}",
}


def main():
    model = hw.load("t2i-digits")
    found = hw.analyses.head_relevance(model, drawn.prompts(12, seed=0), concepts=CONCEPTS)
    prompts = drawn.prompts(30, seed=1)
    page = make_subplots(1, 3, subplot_titles=list(CONCEPTS), shared_yaxes=True)
    for column, concept in enumerate(CONCEPTS, 1):
        vector = found.relevance.sel(concept=concept)
        curve = hw.analyses.head_weakening(
            model, prompts, concept, drawn.judge(concept), found, step=6, controls=2, seed=100
        )
        largest = curve.ranked.values[:3].tolist()
        print(f"{concept}: largest {', '.join(largest)} ({float(vector.max()):.2f} times the mean)")
        for order in curve.order.values.tolist():
            told = " ".join(f"{float(x):.2f}" for x in curve.measure.sel(order=order))
            print(f"  {order:11} {told}")
        for against in curve.against.values.tolist():
            gap, low, high = (float(curve[n].sel(against=against)) for n in ("gap", "gap_low", "gap_high"))
            print(f"  area above most first: {against} {gap:.2f} [{low:.2f}, {high:.2f}]")
        for order in curve.order.values.tolist():
            style = {"dash": "dot", "color": "grey"} if order.startswith("random") else {}
            line = go.Scatter(
                x=curve.heads,
                y=curve.measure.sel(order=order),
                name=order,
                line=style,
                showlegend=column == 1,
            )
            page.add_trace(line, 1, column)
    page.update_xaxes(title="heads × -2").update_yaxes(range=[0, 1.02])
    page.update_layout(
        template="plotly_white", width=900, height=340, title="share read as told by vit-digits"
    )
    if len(sys.argv) > 1:
        page.write_image(Path(sys.argv[1], "vision_head_relevance.svg"))


if __name__ == "__main__":
    main()
