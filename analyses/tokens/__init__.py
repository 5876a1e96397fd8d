"""How much of each input token there is in each output.

Question: From which tokens does it come?
"""
