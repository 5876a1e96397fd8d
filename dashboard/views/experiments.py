"""Experiments."""

import streamlit as st

st.header("Experiments")
