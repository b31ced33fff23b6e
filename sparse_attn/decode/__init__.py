"""Decoding with caches: a cache for each kind of attention, extended and attended token by token or in chunks.

cache    what all three share, and `rollback`
moba     completed blocks and their means
"""

from sparse_attn.decode.cache import rollback
from sparse_attn.decode.moba import MoBACache, extend_moba_cache, init_moba_cache, moba_cached_attention

__all__ = [
    "MoBACache",
    "extend_moba_cache",
    "init_moba_cache",
    "moba_cached_attention",
    "rollback",
]
