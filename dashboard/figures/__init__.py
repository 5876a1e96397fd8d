"""Figures: plain plotly, chosen by what a result's dimensions are; `headwater.figure` is the way in."""
