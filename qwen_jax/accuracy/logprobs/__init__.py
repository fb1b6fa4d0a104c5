"""Two engines' log-probabilities of the same texts: how far apart they are, and why."""
