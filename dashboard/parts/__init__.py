"""What several pages draw: token chips, the likeliest answers, edit forms, figures with their numbers."""
