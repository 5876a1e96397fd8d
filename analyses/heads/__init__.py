"""What a head does alone, and what is lost without it."""
