"""Block-Attention against the mask of its authors' code and attention under that mask."""

import jax
import numpy as np

from sparse_attn.systems.block_attention import BlockAttention


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    lengths = np.broadcast_to(arrays["segment_lengths"].astype(np.int32), (len(query), len(arrays["segment_lengths"])))
    attention = BlockAttention(query_block_size=32, key_block_size=16)
    levels = jax.jit(attention.select)(query, key, lengths)
    blocks = jax.jit(attention.blocks)(query, key, lengths)
    position = blocks.key_position()[:, None, :, 0]
    mask = (blocks.start[..., None] <= position) & (position < blocks.stop[..., None])
    np.testing.assert_array_equal(mask, np.broadcast_to(arrays["token_mask"], mask.shape))
    chosen = np.asarray(levels.to_mask()).repeat(32, 2).repeat(16, 3)[:, :, : mask.shape[1], : mask.shape[2]]
    assert (chosen >= np.asarray(mask)[:, None]).all(), "a visible pair lies outside the chosen tiles"
    output = jax.jit(attention)(query, key, value, lengths)
    np.testing.assert_allclose(output.swapaxes(1, 2), arrays["output"], rtol=0, atol=1e-4)
