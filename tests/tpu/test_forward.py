"""The TPU forward kernels for choices made by every query, interpreted on a CPU, against the NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu.per_query import forward
from pallas_kernels.tpu.per_query.memory import parts_of, words_of
from sparse_attn.attend.backends import TpuKernels
from sparse_attn.attend.choice import PerQuery
from sparse_attn.layout import whole_rows
from tests import attend, cases
from tests.tpu.per_query import CASES, LOUD, with_chunks

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("strict_ranks")]


def sizes(head_dim, dtype, num_rows=128):
    """Sizes for chunks of so many rows."""
    parts = parts_of(words_of(head_dim, dtype) + 1) + parts_of(head_dim + 2)
    return with_chunks(num_rows, 512 * parts)


def bounds(case):
    """Bound of the logits of each key/value head, in units of log2: which kernel it takes."""
    arrays, _, _ = attend.inputs(case, LOUD)
    query, key = (np.linalg.norm(arrays[name].astype(np.float64), axis=-1) for name in ("query", "key"))
    query = np.nanmax(query.reshape(*query.shape[:2], case.kv_heads, -1), axis=(0, 1, 3))
    return query * np.nanmax(key, axis=(0, 1)) * attend.scale_of(case) * np.log2(np.e)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_kernels_give_the_oracle_s_output_and_log_sum_exp(case, interpret):
    arrays, sequences, selection = attend.inputs(case, LOUD)
    assert bounds(case).min() < forward.FIXED_RANGE / 1.2
    assert case.kv_heads == 1 or bounds(case).max() > forward.FIXED_RANGE * 1.2
    config = sizes(case.head_dim, cases.as_dtype(case.dtype), num_rows=384 if case.name == "pieces" else 128)
    backend = TpuKernels(config, interpret=interpret)

    @jax.jit
    def call(query, key, value, indices, sequences):
        prepared, blocks = attend.prepare(case, query, key, value, sequences)
        return backend.forward(prepared, PerQuery(indices, blocks), attend.scale_of(case))

    results = call(arrays["query"], arrays["key"], arrays["value"], selection, sequences)
    attend.check_results(case, *results, LOUD)


def test_logits_at_the_edge_of_the_range_and_beyond_neither_overflow_nor_vanish(interpret):
    """Equal keys weigh the same however large the logit, and the log-sum-exp moves by the logit."""
    logits = np.array([-2000, -79.9, -1, 79.9, 2000], np.float32)  # times log2(e), one a head
    tokens, block_size, head_dim = 32, 16, 64
    query = np.zeros((1, tokens, logits.size, head_dim), np.float32)
    key = np.zeros_like(query)
    query[..., 0], key[..., 0] = logits / np.log2(np.e), 1
    value = np.random.default_rng(0).standard_normal(query.shape).astype(np.float32)
    indices = np.broadcast_to(np.array([0, 1], np.int32), (1, logits.size, tokens, 2))
    blocks = whole_rows(query, key, block_size=block_size, is_causal=True)
    backend = TpuKernels(sizes(head_dim, "float32"), interpret=interpret)
    forward = jax.jit(lambda arrays, indices: backend.forward(arrays, PerQuery(indices, blocks), 1.0))
    output, log_sum_exp = forward((query, key, value), indices)
    number = np.arange(1, tokens + 1)
    cases.assert_close(output[0], value[0].cumsum(0) / number[:, None, None], "float32")
    cases.assert_close(log_sum_exp[0], np.log(number)[:, None] + logits / np.log2(np.e), "float32")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "word"),
    [("float16", 64, 16, "float16"), ("float32", 40, 16, "head_dim=40"), ("float32", 64, 8, "block_size=8")],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason_S10(dtype, head_dim, block_size, word):
    array = jnp.zeros((1, 32, 1, head_dim), dtype)
    choice = PerQuery(
        jnp.zeros((1, 1, 32, 1), jnp.int32), whole_rows(array, array, block_size=block_size, is_causal=True)
    )
    arrays = array, array, array
    assert word in TpuKernels().refuses(arrays, choice)
    with pytest.raises(NotImplementedError, match=word):
        TpuKernels().forward(arrays, choice, 1.0)
