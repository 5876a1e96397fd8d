"""Where attention rests without need, and what it does there."""
