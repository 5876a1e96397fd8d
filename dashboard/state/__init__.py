"""What a session looks at: its state, the address that holds it, and what is kept on disk."""
