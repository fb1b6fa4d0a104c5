"""Traces: the named tensors of one text through one engine, ours or another."""
