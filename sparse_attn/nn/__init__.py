"""Flax NNX modules. From Linen, wrap them in `flax.nnx.bridge.ToLinen`."""

from sparse_attn.nn.config import TransformerConfig
from sparse_attn.nn.dense import DenseAttention
from sparse_attn.nn.key_conv import KeyConv
from sparse_attn.nn.moba import MoBAAttention, moba_attention_fn
from sparse_attn.nn.sliding_window import SlidingWindowAttention
from sparse_attn.nn.transformer import Transformer

__all__ = [
    "DenseAttention",
    "KeyConv",
    "MoBAAttention",
    "SlidingWindowAttention",
    "Transformer",
    "TransformerConfig",
    "moba_attention_fn",
]
