"""The bundled model writes three different haiku on one word.

    python run.py --config=configs/haiku.py --prompt='Write a haiku about rivers.'

Needs nothing but the package; takes three seconds on two CPU cores. Expect three samples of
three lines; `--config=configs/haiku.py:greedy` writes the single likeliest one instead.
"""

from ml_collections import ConfigDict

from qwen_jax.settings import get_config as defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is "" or "greedy"."""
    if variant not in ("", "greedy"):
        raise ValueError(f"configs/haiku.py has no variant {variant!r}, only 'greedy'")
    config = defaults()
    config.prompt = "Write a haiku that contains the word river."
    if variant != "greedy":
        config.n = 3
        config.sampling.temperature = 0.8
        config.sampling.min_p = 0.05
    return config
