"""Flow."""

import streamlit as st

st.header("Flow")
