"""Models outside transformers: a module whose attention calls `scaled_dot_product_attention` is met at that call."""
