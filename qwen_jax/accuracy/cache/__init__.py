"""The cache audit: whatever way a text takes through the cache, the same must come out."""
