"""The step for so many rows that an input doesn't fit in shared memory: up to 64."""
