"""Changed runs: copies of prompts, activations replaced, layers below resumed."""
