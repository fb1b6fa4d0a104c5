"""Weights in the order in which blocks read them: the plan, packing, and back again."""
