"""MoBA against its authors' choices and outputs. Their block ids start at each sequence, ours run through a row."""

import functools

import jax
import numpy as np

import sparse_attn
from tests.backends import PLAIN

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def options_of(arrays):
    """Lengths of the packed sequences, and the options of the call, which takes them as segments."""
    lengths = np.diff(arrays["cu_seqlens"]) if "cu_seqlens" in arrays else arrays["seq_lengths"]
    ids = np.repeat(np.arange(lengths.size), lengths).astype(np.int32)[None]  # [1, tokens]
    top_k = arrays["topk"] if "topk" in arrays else arrays["top_k"]
    sizes = {"block_size": arrays["block_size"].item(), "top_k": top_k.item()}
    return lengths, {**sizes, "is_causal": True, "segment_ids": ids}


def check(arrays):
    lengths, options = options_of(arrays)
    query, key, value = (arrays[name][None] for name in "qkv")  # [1, tokens, heads, head_dim]
    for implementation in PLAIN:
        choose = functools.partial(sparse_attn.route_moba, **options, implementation=implementation)
        attend = functools.partial(sparse_attn.moba_attention, **options, implementation=implementation)
        indices = np.asarray(jax.jit(choose)(query, key).indices)[0]
        check_choice(arrays, indices, lengths, options["block_size"])
        assert_close(jax.jit(attend)(query, key, value)[0], arrays["output"])


def check_choice(arrays, indices, lengths, block_size):
    """indices `[heads, tokens, top_k]`: own block first, the same blocks as theirs, by falling gate."""
    blocks = -(-lengths // block_size)  # of every sequence
    first_block = np.repeat(np.cumsum(blocks) - blocks, lengths)[:, None]  # [tokens, 1]
    position = np.concatenate([np.arange(length) for length in lengths])
    is_chosen = indices >= 0
    local = np.where(is_chosen, indices - first_block, 0)  # [heads, tokens, top_k], block inside its own sequence
    np.testing.assert_array_equal(local[..., 0], np.broadcast_to(position // block_size, local.shape[:2]))

    mask = np.zeros_like(arrays["block_mask"])  # [heads, tokens, blocks of a sequence]
    for row in np.argwhere(is_chosen):
        mask[row[0], row[1], local[tuple(row)]] = True
    np.testing.assert_array_equal(mask, arrays["block_mask"])

    gate = np.take_along_axis(arrays["gate_unmasked"], local, axis=-1)[..., 1:]  # behind the own block: falling
    rises = (np.diff(gate, axis=-1) > 1e-4) & is_chosen[..., 2:]
    assert not rises.any()
