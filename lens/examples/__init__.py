"""What a user gives as examples: texts, pictures and sounds, made into a model's inputs by its own processor."""
