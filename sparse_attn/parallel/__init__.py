"""Attention over a sequence that is split over devices, for use inside `jax.shard_map`."""

from sparse_attn.parallel.attention import moba_attention_sharded
from sparse_attn.parallel.communication import Bytes, Method, communication_bytes
from sparse_attn.parallel.layout import CONTIGUOUS, Layout, shard_sequence, unshard_sequence

__all__ = [
    "CONTIGUOUS",
    "Bytes",
    "Layout",
    "Method",
    "communication_bytes",
    "moba_attention_sharded",
    "shard_sequence",
    "unshard_sequence",
]
