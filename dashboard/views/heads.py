"""Heads."""

import streamlit as st

st.header("Heads")
