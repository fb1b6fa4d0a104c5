"""The decoder, what it keeps between calls, and the way to look into it."""
