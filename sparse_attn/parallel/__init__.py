"""Attention over a sequence that is split over devices, for use inside `jax.shard_map`."""

from sparse_attn.parallel.attention import moba_attention_sharded
from sparse_attn.parallel.communication import Bytes, Method, communication_bytes
from sparse_attn.parallel.halo import causal_key_convolution_sharded, sliding_window_attention_sharded
from sparse_attn.parallel.layout import CONTIGUOUS, Layout, shard_sequence, unshard_sequence

__all__ = [
    "CONTIGUOUS",
    "Bytes",
    "Layout",
    "Method",
    "causal_key_convolution_sharded",
    "communication_bytes",
    "moba_attention_sharded",
    "shard_sequence",
    "sliding_window_attention_sharded",
    "unshard_sequence",
]
