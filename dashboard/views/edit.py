"""Edit."""

import streamlit as st

st.header("Edit")
