"""Operations of a Qwen2.5 decoder, one package each: a public function, its reference, its kernel.

Shape letters: B batch, T query positions, S cache capacity, N query heads, K key/value
heads, G = N/K query heads per key/value head, H head dimension. A paged cache is a pool of P
pages of C slots each, and a block table names the n pages of a row: S = n C.
"""

from pallas_kernels.all_reduce import all_reduce
from pallas_kernels.decode_step import decode_step
from pallas_kernels.gqa_decode_attention import gqa_decode_attention
from pallas_kernels.gqa_prefill_attention import gqa_prefill_attention
from pallas_kernels.implementation import (
    OPERATIONS,
    Implementation,
    UnsupportedError,
    choose,
    refusal,
)
from pallas_kernels.packed_product import packed_feed_forward, packed_product
from pallas_kernels.rope import rope
from pallas_kernels.sample_tokens import sample_tokens

__all__ = [
    "OPERATIONS",
    "Implementation",
    "UnsupportedError",
    "all_reduce",
    "choose",
    "decode_step",
    "gqa_decode_attention",
    "gqa_prefill_attention",
    "packed_feed_forward",
    "packed_product",
    "refusal",
    "rope",
    "sample_tokens",
]
