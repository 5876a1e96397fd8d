"""What the pages run: models held, runs A and B, the measure, jobs."""
