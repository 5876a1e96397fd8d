"""Circuits."""

import streamlit as st

st.header("Circuits")
