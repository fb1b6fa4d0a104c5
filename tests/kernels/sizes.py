"""Query heads N, key/value heads K and head dimension H of every released Qwen2.5 size."""

HEADS = {
    "0.5b": (14, 2, 64),
    "1.5b": (12, 2, 128),
    "3b": (16, 2, 128),
    "7b": (28, 4, 128),
    "14b": (40, 8, 128),
    "32b": (40, 8, 128),
    "72b": (64, 8, 128),
}
