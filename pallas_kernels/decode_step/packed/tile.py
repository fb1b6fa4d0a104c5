"""A tile: the piece of a weight matrix that every storage holds in some bytes of its own."""

M_TILE = 16
"""Outputs of an M-tile: the rows of one tensor-core product."""
K_TILE = 128
"""Inputs of a tile."""
WARPS = K_TILE // 16
"""That take 16 inputs of a tile each."""
