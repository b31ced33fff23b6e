"""FlashMoBA: MoBA with small blocks and a short convolution on the keys.

Paper: Optimizing Mixture of Block Attention (arXiv 2511.11571). The algorithm of `sparse_attn.systems.moba` on keys
that `causal_key_convolution` has spread over their neighbours, for routing and attention alike. The paper's pairs of
(block_size, top_k) keep 7/8 of the keys out: (512, 2), (256, 4), (128, 8), the last being the best.

Where code and paper disagree: the released CUDA kernels take any block size; the choice of width 3 or 5 is the paper's.
"""

import jax

from sparse_attn.attention import moba_attention, route_moba
from sparse_attn.keys import causal_key_convolution
from sparse_attn.selection import BlockSelection
from sparse_attn.systems.recipe import Recipe

RECIPE = Recipe(
    name="FlashMoBA",
    paper="2511.11571",
    blocks="1 / 128",
    describe="mean of convolved keys",
    score="dot",
    choose="per query token and head: top-k, own block forced and counted",
    is_trainable=True,
)


def select(
    query: jax.Array,
    key: jax.Array,
    kernel: jax.Array,
    *,
    block_size: int = 128,
    top_k: int = 8,
    is_causal: bool = True,
) -> BlockSelection:
    """The blocks that `attention` attends: those of `route_moba` on convolved keys.

    Args: those of `attention`.
    """
    return route_moba(
        query, causal_key_convolution(key, kernel), block_size=block_size, top_k=top_k, is_causal=is_causal
    )


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel: jax.Array,
    *,
    block_size: int = 128,
    top_k: int = 8,
    is_causal: bool = True,
    scale: float | None = None,
) -> jax.Array:
    """`moba_attention` with keys k'_t = k_t + silu(sum_l kernel_l k_{t-l}).

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`.
      value: shaped like key.
      kernel: `[width, kv_heads, head_dim]`, the weights of the convolution; the paper's widths are 3 and 5.
      block_size, top_k, is_causal, scale: as in `moba_attention`.

    Returns:
      Array of query's shape and dtype.
    """
    key = causal_key_convolution(key, kernel)
    return moba_attention(query, key, value, block_size=block_size, top_k=top_k, is_causal=is_causal, scale=scale)
