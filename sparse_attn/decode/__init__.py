"""Decoding with caches: attention to a row that grows chunk by chunk or token by token, as if it had come whole.

cache    what all caches share, and `rollback`
moba     `moba_attention`: completed blocks and their means
window   `sliding_window_attention`: a ring
dense    dense attention: everything

The values `MoBA`, `FlashMoBA`, `SlidingWindow` and `Dense` do the same with two methods alike for all, `init_cache` and
`attend_cached`.
"""

from sparse_attn.decode.cache import Cache, rollback
from sparse_attn.decode.dense import DenseCache, dense_cached_attention, extend_dense_cache, init_dense_cache
from sparse_attn.decode.moba import MoBACache, extend_moba_cache, init_moba_cache, moba_cached_attention
from sparse_attn.decode.window import WindowCache, init_window_cache, window_cached_attention

__all__ = [
    "Cache",
    "DenseCache",
    "MoBACache",
    "WindowCache",
    "dense_cached_attention",
    "extend_dense_cache",
    "extend_moba_cache",
    "init_dense_cache",
    "init_moba_cache",
    "init_window_cache",
    "moba_cached_attention",
    "rollback",
    "window_cached_attention",
]
