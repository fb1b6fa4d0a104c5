"""Parts of random JSON schemas, for hypothesis."""

from typing import Any

from hypothesis import strategies as st

Schemas = st.SearchStrategy[Any]


def arrays(inner: Schemas) -> Schemas:
    """Arrays of up to three of these."""
    return st.builds(
        lambda items, a, b: {
            "type": "array",
            "items": items,
            "minItems": min(a, b),
            "maxItems": max(a, b),
        },
        inner,
        st.integers(0, 3),
        st.integers(0, 3),
    )


def any_of(inner: Schemas) -> Schemas:
    """One of up to three of these."""
    return st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})
