"""Block-Attention against the mask of its authors' code and attention under that mask."""

import functools

import jax
import numpy as np

from sparse_attn.systems import block_attention


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    lengths = np.broadcast_to(arrays["segment_lengths"].astype(np.int32), (len(query), len(arrays["segment_lengths"])))
    tiles = {"query_block_size": 32, "key_block_size": 16}
    levels = jax.jit(functools.partial(block_attention.select, **tiles))(query, key, lengths)
    start, stop, position = jax.jit(block_attention.segment_visibility)(query, key, lengths)
    mask = (start[..., None] <= position[..., 0][:, None]) & (position[..., 0][:, None] < stop[..., None])
    np.testing.assert_array_equal(mask, np.broadcast_to(arrays["token_mask"], mask.shape))
    chosen = np.asarray(levels.to_mask()).repeat(32, 2).repeat(16, 3)[:, :, : mask.shape[1], : mask.shape[2]]
    assert (chosen >= np.asarray(mask)[:, None]).all(), "a visible pair lies outside the chosen tiles"
    output = jax.jit(functools.partial(block_attention.attention, **tiles))(query, key, value, lengths)
    np.testing.assert_allclose(output.swapaxes(1, 2), arrays["output"], rtol=0, atol=1e-4)
