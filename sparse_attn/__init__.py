"""Block-sparse attention for JAX. Arrays are [batch, sequence, heads, head_dim]; sizes are counted in tokens."""

from sparse_attn import decode, reference, theory
from sparse_attn.attend.partial import merge_partials
from sparse_attn.attention import block_sparse_attention, moba_attention, route_moba
from sparse_attn.keys import causal_key_convolution
from sparse_attn.selection import BlockSelection
from sparse_attn.window import sliding_window_attention

__version__ = "0.1.0"

__all__ = [
    "BlockSelection",
    "block_sparse_attention",
    "causal_key_convolution",
    "decode",
    "merge_partials",
    "moba_attention",
    "reference",
    "route_moba",
    "sliding_window_attention",
    "theory",
]
