"""One forward pass or one generation, with the edits that are on."""
