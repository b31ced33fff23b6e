"""The GPU kernels that attend, on a GPU or interpreted on a CPU, against loops in NumPy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pallas_kernels.config import TRITON, TritonConfig
from sparse_attn import pallas
from sparse_attn.attention import _prepare
from tests import cases, oracle
from tests.cases import Case

pytestmark = pytest.mark.timeout(120)

# Small, so that a chunk of 60 rows has several groups of rows to merge, a block several tiles and stretches of keys.
SMALL = TritonConfig(tile_size=16, key_size=16, backward_tile_size=16, merge_rows=16)
CHUNK_ROWS = 60

# Query heads per key/value head: 7, 4, 1, 3, 8, 2. Heads have three or four chunks, the last one shorter, but for
# "all_see_lengths", which has three chunks of two heads. In "grouped_ragged" and "wide" a block has three stretches of
# keys, the last of eight, and in the first one three tiles, the last of which is not full.
CASES = (
    Case("grouped_ragged", 1, 25, 50, heads=14, head_dim=20, block_size=40, top_k=4, scale=0.7),
    Case("mixed_segments", batch=3, queries=37, keys=45, heads=8, block_size=4, top_k=3, sequences="mixed"),
    Case("all_see_lengths", batch=3, queries=29, keys=61, block_size=7, is_causal=False, sequences="lengths"),
    Case("wide", batch=1, queries=67, keys=50, heads=3, kv_heads=1, head_dim=256, block_size=40, top_k=1),
    Case("bfloat16", batch=1, dtype="bfloat16", heads=8, kv_heads=1, queries=22, keys=48, block_size=16, top_k=3),
    # With the default sizes, all heads in one chunk.
    Case("default_float16", 2, 40, 48, heads=4, dtype="float16", sequences="segments", block_size=1, top_k=5),
)


def draw_call(seed):
    """Shape and sizes at random."""
    random = np.random.default_rng(seed)
    kv_heads = int(random.integers(1, 3))
    numbers = {"batch": (1, 3), "queries": (1, 50), "keys": (1, 70), "head_dim": (1, 40), "block_size": (1, 50)}
    case = Case(
        f"random_{seed}",
        heads=kv_heads * int(random.choice((1, 2, 3, 4, 7, 8))),
        kv_heads=kv_heads,
        top_k=int(random.integers(1, 5)),
        is_causal=bool(random.integers(2)),
        dtype=str(random.choice(("float32", "bfloat16", "float16"))),
        sequences=str(random.choice(("full", "lengths", "segments", "mixed"))),
        **{name: int(random.integers(*bounds)) for name, bounds in numbers.items()},
    )
    names = ("tile_size", "key_size", "backward_tile_size", "merge_rows")
    sizes = TritonConfig(**{name: int(random.choice((16, 32))) for name in names})
    return case, with_chunks(case, sizes, num_rows=int(random.integers(5, 60)))


def with_chunks(case, config, num_rows):
    """The sizes with chunks of so many rows at most."""
    row_bytes = case.top_k * (case.head_dim * cases.as_dtype(case.dtype).itemsize + 16)
    return dataclasses.replace(config, chunk_bytes=num_rows * row_bytes)


@functools.cache
def inputs(case):
    """Arrays, sequence arguments, and block ids that no router would give."""
    arrays, sequences = cases.make_inputs(case)
    arrays["d_log_sum_exp"] = np.random.default_rng(1).standard_normal(arrays["query"].shape[:3]).astype(np.float32)
    is_packed = case.sequences in ("segments", "mixed")  # then about so many blocks exist
    num_blocks = min(4 + case.keys // case.block_size, case.keys) if is_packed else case.num_blocks
    return arrays, sequences, cases.make_selection(case, num_blocks=num_blocks)


@functools.cache
def expected(case):
    """Output, log-sum-exp L `[batch, queries, heads]`, and the gradients of sum(d_output output + d_log_sum_exp L)."""
    arrays, sequences, selection = inputs(case)
    query, key, value, d_output, d_log_sum_exp = arrays.values()
    reach = {"num_keys": case.keys, "block_size": case.block_size, "is_causal": case.is_causal}
    mask = oracle.attention_mask(selection, **reach, **sequences)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
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


def attend(case, arrays, selection, sequences, **options):
    """Output and log-sum-exp from the kernels, and what pulls gradients back."""
    names = ("query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids")
    given = [sequences.get(name) for name in names]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale

    def call(query, key, value):
        query, (key, value), layout = _prepare(query, (key, value), case.block_size, case.is_causal, *given)
        return pallas.attend(query, key, value, selection, layout, scale=scale, **options)

    return jax.vjp(call, *(arrays[name] for name in ("query", "key", "value")))


def run(case, **options):
    """The three of `expected` from the kernels, with the configuration and the interpreter given."""

    @jax.jit
    def call(arrays, selection, sequences):
        results, pull_back = attend(case, arrays, selection, sequences, **options)
        return *results, pull_back((arrays["d_output"], arrays["d_log_sum_exp"]))

    arrays, sequences, selection = inputs(case)
    return jax.block_until_ready(call(arrays, selection, sequences))


def check_results(case, output, log_sum_exp):
    expected_output, expected_sum, _ = expected(case)
    assert output.dtype == cases.as_dtype(case.dtype)
    cases.assert_close(output, expected_output, case.dtype)
    is_empty = np.isneginf(expected_sum)
    np.testing.assert_array_equal(np.isneginf(log_sum_exp), is_empty)
    cases.assert_close(np.asarray(log_sum_exp)[~is_empty], expected_sum[~is_empty], case.dtype)
    np.testing.assert_array_equal(np.asarray(output)[is_empty], 0)


def check_gradients(case, gradients):
    _, expected_sum, expected_gradients = expected(case)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == cases.as_dtype(case.dtype)
        assert gradient.shape == expected_gradient.shape
        cases.assert_close(gradient, expected_gradient, case.dtype)
    np.testing.assert_array_equal(np.asarray(gradients[0])[np.isneginf(expected_sum)], 0)


@functools.cache
def actual(case):
    config = TRITON if case.name.startswith("default") else with_chunks(case, SMALL, CHUNK_ROWS)
    return run(case, config=config, interpret=jax.default_backend() != "gpu")


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_outputs_and_log_sum_exp_are_those_of_the_oracle(case):
    check_results(case, *actual(case)[:2])


@every_case
def test_gradients_are_those_of_the_oracle(case):
    check_gradients(case, actual(case)[2])


@pytest.mark.parametrize("seed", range(5))
def test_shapes_and_sizes_at_random(seed):
    case, config = draw_call(seed)
    output, log_sum_exp, gradients = run(case, config=config, interpret=jax.default_backend() != "gpu")
    check_results(case, output, log_sum_exp)
    check_gradients(case, gradients)
