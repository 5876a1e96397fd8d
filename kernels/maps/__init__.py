"""What can be asked of a map that is not in memory: products, statistics, pairs, summaries."""
