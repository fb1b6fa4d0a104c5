"""The decode-step kernel from inside: what it recorded of itself, held against float64."""
