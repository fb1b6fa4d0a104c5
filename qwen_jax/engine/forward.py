"""What one decode step of a model is, whatever its weights are."""

from typing import Protocol

from jaxtyping import Array, Bool, Float, Int

from qwen_jax.model.cache import Cache


class Forward(Protocol):
    """A token of every row, the cache, the tokens' positions and which rows are live, to the logits
    after them and the cache with the live rows' keys and values."""

    def __call__(
        self,
        token: Int[Array, "B"],
        cache: Cache,
        position: Int[Array, "B"],
        live: Bool[Array, "B"],
        preceding: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """
        Args:
            preceding: of each row, how many rows just before it are its own text's preceding
                positions, where there are such; 0 of a row that isn't live.
        """
