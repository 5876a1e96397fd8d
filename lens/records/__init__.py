"""Records of a run: recorded, kept in memory or in one file, saved and opened."""
