"""Attention over block ids that no router would give: inputs, what NumPy expects, and a run through any backend."""

import functools

import jax
import numpy as np

from sparse_attn.attend import derivatives
from sparse_attn.attend.choice import PerQuery
from sparse_attn.attention import _prepare
from sparse_attn.checks import Sequences
from tests import cases, oracle


def scale_of(case):
    return case.head_dim**-0.5 if case.scale is None else case.scale


def prepare(case, query, key, value, sequences):
    """Query, key and value as `block_sparse_attention` hands them to a backend, and the geometry."""
    given = Sequences(**sequences)
    query, (key, value), blocks = _prepare(query, (key, value), given, case.block_size, case.is_causal)
    return (query, key, value), blocks


@functools.cache
def inputs(case, loud=1):
    """Arrays with "d_output" and "d_log_sum_exp", sequence arguments, and block ids.

    The first of two key/value heads is asked `loud` times as strongly. What no query may see is NaN, padding too.
    """
    arrays, sequences = cases.make_inputs(case)
    if case.kv_heads > 1:
        arrays["query"][:, :, : case.heads // case.kv_heads] *= loud
    arrays["d_log_sum_exp"] = np.random.default_rng(1).standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    is_packed = case.sequences in ("segments", "mixed")  # then about so many blocks exist
    num_blocks = min(4 + case.keys // case.block_size, case.keys) if is_packed else case.num_blocks
    selection = cases.make_selection(case, num_blocks=num_blocks)
    everything = np.broadcast_to(np.arange(case.num_blocks), (*selection.shape[:3], case.num_blocks))
    is_reachable = mask_of(case, everything, sequences).any((1, 2))  # [batch, keys]
    for name in ("key", "value"):
        arrays[name][~is_reachable] = np.nan
    for row, length in enumerate(sequences.get("query_seq_lengths", ())):
        arrays["query"][row, length:] = np.nan
        arrays["d_output"][row, length:] = 0
    return arrays, sequences, selection


def mask_of(case, indices, sequences):
    """Which query attends which key: bool `[batch, heads, queries, keys]`."""
    reach = {"num_keys": case.keys, "block_size": case.block_size, "is_causal": case.is_causal}
    return oracle.attention_mask(indices, **reach, **sequences)


@functools.cache
def expected(case, loud=1):
    """Output, log-sum-exp L `[batch, queries, heads]`, and the gradients of sum(d_output output + d_log_sum_exp L)."""
    arrays, sequences, selection = inputs(case, loud)
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


def run(case, backend, loud=1):
    """The three of `expected` from a backend."""

    @jax.jit
    def call(arrays, selection, sequences):
        def attend(query, key, value):
            prepared, blocks = prepare(case, query, key, value, sequences)
            output, log_sum_exp = derivatives.attend(backend, prepared, PerQuery(selection, blocks), scale_of(case))
            return output.astype(query.dtype), log_sum_exp

        results, pull_back = jax.vjp(attend, *(arrays[name] for name in ("query", "key", "value")))
        return *results, pull_back((arrays["d_output"], arrays["d_log_sum_exp"]))

    arrays, sequences, selection = inputs(case, loud)
    return jax.block_until_ready(call(arrays, selection, sequences))


def check_results(case, output, log_sum_exp, loud=1):
    expected_output, expected_sum, _ = expected(case, loud)
    assert output.dtype == cases.as_dtype(case.dtype)
    assert log_sum_exp.dtype == np.float32
    cases.assert_close(output, expected_output, case.dtype)
    is_empty = np.isneginf(expected_sum)
    np.testing.assert_array_equal(np.isneginf(log_sum_exp), is_empty)
    cases.assert_close(np.asarray(log_sum_exp)[~is_empty], expected_sum[~is_empty], case.dtype)
    np.testing.assert_array_equal(np.asarray(output, np.float32)[is_empty], 0)


def check_gradients(case, gradients, loud=1):
    _, expected_sum, expected_gradients = expected(case, loud)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == cases.as_dtype(case.dtype)
        assert gradient.shape == expected_gradient.shape
        cases.assert_close(gradient, expected_gradient, case.dtype)
    np.testing.assert_array_equal(np.asarray(gradients[0], np.float32)[np.isneginf(expected_sum)], 0)
