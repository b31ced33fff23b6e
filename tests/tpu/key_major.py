"""What the tests of the key-major TPU kernels share: named shapes, small sizes, inputs, and what NumPy expects."""

import functools

import numpy as np

from pallas_kernels.config import KeyMajorConfig
from sparse_attn.attention import _prepare
from tests import cases, oracle
from tests.cases import Case

# Several chunks (forward, where a chunk has at least 128 rows: of the one case that has more), tiles and steps.
SMALL = KeyMajorConfig(tile_size=32, slots_per_step=64, backward_tile_size=32, chunk_bytes=72 * 1024)

CASES = (
    Case("packed", batch=2, queries=18, keys=27, heads=4, head_dim=64, block_size=16, top_k=3, sequences="mixed"),
    Case("lengths", queries=33, keys=50, head_dim=128, block_size=32, dtype="bfloat16", sequences="lengths"),
    Case("odd_blocks", batch=1, queries=65, keys=50, heads=4, head_dim=96, block_size=24, is_causal=False, scale=0.13),
    Case("wide", batch=1, queries=16, keys=60, head_dim=256, block_size=16, top_k=3),
    Case("wide_bfloat16", batch=1, queries=12, keys=60, head_dim=256, block_size=48, top_k=2, dtype="bfloat16"),
)


def scale_of(case):
    return case.head_dim**-0.5 if case.scale is None else case.scale


@functools.cache
def make_inputs(case):
    """Arrays, sequence arguments, and block ids that no router would give.

    The first half of the heads asks eight times as strongly, so that its logits leave the range of the kernel without a
    maximum. Whatever no query may see is NaN.
    """
    arrays, sequences = cases.make_inputs(case)
    arrays["query"][:, :, : case.heads // case.kv_heads] *= 8
    selection = cases.make_selection(case)
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
