"""Catalogue."""

import streamlit as st

st.header("Catalogue")
