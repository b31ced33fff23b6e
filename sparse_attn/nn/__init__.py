"""Flax NNX modules. From Linen, wrap them in `flax.nnx.bridge.ToLinen`."""

from sparse_attn.nn.attention import (
    Attention,
    DenseAttention,
    MoBAAttention,
    SelfAttention,
    SlidingWindowAttention,
)
from sparse_attn.nn.cached import Cached
from sparse_attn.nn.config import TransformerConfig
from sparse_attn.nn.generate import Generated, Sampling
from sparse_attn.nn.key_conv import KeyConv
from sparse_attn.nn.moba import moba_attention_fn
from sparse_attn.nn.transformer import Transformer

__all__ = [
    "Attention",
    "Cached",
    "DenseAttention",
    "Generated",
    "KeyConv",
    "MoBAAttention",
    "Sampling",
    "SelfAttention",
    "SlidingWindowAttention",
    "Transformer",
    "TransformerConfig",
    "moba_attention_fn",
]
