"""How much room the cache has: by texts, context, platform and free memory."""

import jax.numpy as jnp
import pytest

from qwen_jax.engine import memory
from qwen_jax.engine.layout import Layout
from qwen_jax.model.cache import bytes_per_token
from tests.golden_cases import odd_config

CONFIG = odd_config(num_layers=1, context_length=32768)
FLOAT = jnp.dtype(jnp.float32)
EACH = bytes_per_token(CONFIG, 4)


@pytest.mark.parametrize(
    ("platform", "slots", "texts", "tokens"),
    [
        ("gpu", None, None, 64 * 8192),
        ("gpu", None, 1, 32768),
        ("gpu", None, 2, 8 * 8192),  # of the next program's 8 rows
        ("gpu", None, 10_000, 64 * 8192),
        ("gpu", 3, None, 32768),
        ("cpu", None, None, 32768),
        ("cpu", 64, None, 64 * 1024),
        ("cpu", 64, 1, 32768),
    ],
)
def test_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    slots: int | None,
    texts: int | None,
    tokens: int,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10**12)
    layout = Layout.of(CONFIG, FLOAT, platform, loaded=True, slots=slots, texts=texts)
    assert layout.cache_tokens == tokens


def test_no_more_than_the_context_of_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10**12)
    config = odd_config(num_layers=1, context_length=512)
    assert Layout.of(config, FLOAT, "gpu", loaded=True).cache_tokens == 64 * 512


@pytest.mark.parametrize(("platform", "part"), [("gpu", 0.3), ("cpu", 0.5)])
def test_what_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, platform: str, part: float
) -> None:
    """With four significant bits."""
    spare = 10_000 * EACH / part
    monkeypatch.setattr(memory, "free_memory", lambda: int(spare) + (2 << 30))
    tokens = Layout.of(CONFIG, FLOAT, platform, loaded=True).cache_tokens
    if platform == "gpu":
        assert tokens == 72 * 128  # 78 pages are 0b1001110
    else:
        assert tokens == 32768
