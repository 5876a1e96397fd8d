"""Sinks."""

import streamlit as st

st.header("Sinks")
