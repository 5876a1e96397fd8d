"""Head."""

import streamlit as st

st.header("Head")
