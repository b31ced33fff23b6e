"""What the tests of the key-major TPU kernels share: named shapes, small sizes, inputs, and what NumPy expects."""

import dataclasses
import functools

import numpy as np

from pallas_kernels.config import KeyMajorConfig
from pallas_kernels.tpu.key_work import SPARE_ROWS
from sparse_attn.attention import _prepare
from tests import cases, oracle
from tests.cases import Case

# Three tiles a step, several steps, the last of which is not full.
SMALL = KeyMajorConfig(tile_size=8, slots_per_step=24, backward_tile_size=8, piece_rows=128, pieces_per_step=4)

# Query heads per key/value head: 1, 2, 3, 4, 7, 8. "odd_blocks" has three chunks of 128 rows in the forward pass, the
# last of them with three rows; "pieces" has one of three pieces.
CASES = (
    Case("packed", batch=2, queries=26, keys=50, heads=6, head_dim=64, block_size=16, top_k=4, sequences="mixed"),
    Case("lengths", queries=33, keys=50, heads=4, head_dim=128, block_size=32, dtype="bfloat16", sequences="lengths"),
    Case("odd_blocks", 1, 37, 50, heads=14, head_dim=96, block_size=24, top_k=1, is_causal=False, scale=0.13),
    Case("pieces", 1, 65, 40, heads=4, kv_heads=1, head_dim=64, block_size=16, top_k=1, is_causal=False),
    Case("wide", batch=1, queries=19, keys=60, head_dim=256, block_size=16, top_k=3),
    Case("wide_bfloat16", 1, 5, 60, heads=16, head_dim=256, block_size=48, top_k=2, dtype="bfloat16"),
)


def with_chunks(num_rows, row_bytes):
    """Sizes for chunks of so many rows at most."""
    return dataclasses.replace(SMALL, chunk_bytes=(num_rows + SPARE_ROWS) * row_bytes)


def scale_of(case):
    return case.head_dim**-0.5 if case.scale is None else case.scale


@functools.cache
def make_inputs(case):
    """Arrays, sequence arguments, and block ids that no router would give.

    The first of two key/value heads is asked eight times as strongly, so that its logits leave the range of the kernel
    without a maximum. Whatever no query may see is NaN.
    """
    arrays, sequences = cases.make_inputs(case)
    if case.kv_heads > 1:
        arrays["query"][:, :, : case.heads // case.kv_heads] *= 8
    num_blocks = 4 if case.sequences == "mixed" else case.num_blocks  # so many exist
    selection = cases.make_selection(case, num_blocks=num_blocks)
    everything = np.broadcast_to(np.arange(case.num_blocks), (*selection.shape[:3], case.num_blocks))
    is_reachable = mask_of(case, everything, sequences).any((1, 2))  # [batch, keys]
    for name in ("key", "value"):
        arrays[name][~is_reachable] = np.nan
    for name in ("query", "d_output"):
        for row, length in enumerate(sequences.get("query_seq_lengths", ())):
            arrays[name][row, length:] = np.nan if name == "query" else 0
    arrays["d_log_sum_exp"] = np.random.default_rng(1).standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    return arrays, sequences, selection


def mask_of(case, indices, sequences):
    """Which query attends which key: bool `[batch, heads, queries, keys]`."""
    reach = {"num_keys": case.keys, "block_size": case.block_size, "is_causal": case.is_causal}
    return oracle.attention_mask(indices, **reach, **sequences)


@functools.cache
def expected(case):
    """Output, log-sum-exp L `[batch, queries, heads]`, and the gradients of sum(d_output output + d_log_sum_exp L)."""
    arrays, sequences, selection = make_inputs(case)
    query, key, value, d_output, d_log_sum_exp = arrays.values()
    scale, mask = scale_of(case), mask_of(case, selection, sequences)
    output, (d_query, d_key, d_value) = oracle.attention(query, key, value, mask, scale=scale, d_output=d_output)
    log_sum_exp = np.full(query.shape[:3], -np.inf)
    for b, h, t in np.ndindex(*mask.shape[:3]):
        seen, kv_head = np.flatnonzero(mask[b, h, t]), h // (case.heads // case.kv_heads)
        if seen.size:
            q, k = query[b, t, h].astype(np.float64), key[b, seen, kv_head].astype(np.float64)
            logits = scale * (k @ q)
            log_sum_exp[b, t, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
            d_logits = d_log_sum_exp[b, t, h] * np.exp(logits - log_sum_exp[b, t, h])  # dL/dx = softmax(x)
            d_query[b, t, h] += scale * (d_logits @ k)
            d_key[b, seen, kv_head] += scale * np.outer(d_logits, q)
    return output, log_sum_exp, (d_query, d_key, d_value)


def prepare(case, query, key, value, sequences):
    """Query, key and value as `block_sparse_attention` hands them to an implementation, and the layout."""
    names = ("query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids")
    given = [sequences.get(name) for name in names]
    query, (key, value), layout = _prepare(query, (key, value), case.block_size, case.is_causal, *given)
    return (query, key, value), layout
