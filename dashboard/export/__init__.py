"""What is taken away: Python, experiments, tables, figures, a report."""
