"""How much of each input token there is in each output."""
