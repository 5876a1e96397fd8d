"""Start."""

import streamlit as st

st.header("Start")
