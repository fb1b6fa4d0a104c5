"""Next-token probabilities of a candidate against a base's."""
