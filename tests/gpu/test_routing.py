"""The GPU router, interpreted on a CPU, against loops in NumPy."""

import jax
import numpy as np
import pytest

from pallas_kernels.config import TritonConfig
from pallas_kernels.gpu.triton import routing
from sparse_attn.checks import Sequences
from sparse_attn.layout import make_blocks, order_keys, whole_rows
from tests import cases, oracle
from tests.backends import needs_triton
from tests.cases import Case

pytestmark = [pytest.mark.timeout(120), needs_triton]

# Small, so that short sequences have several tiles and panels, and a block of five keys three steps of two.
SMALL = TritonConfig(route_queries=16, route_blocks=16, means_keys=2)

# Query heads per key/value head: 1, 2, 3, 4, 7, 8.
CASES = (
    Case("ties", batch=1, queries=50, keys=50, heads=6, block_size=4, top_k=3, exact=True),
    # Five panels of blocks, the last one of one block, and tiles of queries that do not reach all of them.
    Case("panels", batch=1, queries=60, keys=130, heads=1, kv_heads=1, block_size=2, top_k=9, exact=True),
    Case("top_64", batch=1, queries=20, keys=150, heads=1, kv_heads=1, block_size=2, top_k=64, is_causal=False),
    Case("mixed", queries=50, keys=70, heads=4, kv_heads=1, block_size=4, top_k=3, sequences="mixed"),
    Case("lengths", batch=3, heads=14, sequences="lengths", queries=37, keys=50, top_k=9, block_size=5, head_dim=20),
    Case("block_of_one", batch=1, queries=41, keys=41, heads=16, block_size=1, top_k=4),
    # More columns than are multiplied at a time.
    Case("bfloat16", batch=1, queries=50, keys=50, head_dim=140, dtype="bfloat16", exact=True, block_size=4),
    Case("float16", batch=1, queries=50, keys=50, heads=4, dtype="float16", exact=True, block_size=4, top_k=1),
)


def route(case, arrays, sequences):
    """Indices `[batch, heads, queries, top_k]` of the kernels, given what the library would give them."""

    @jax.jit
    def call(query, key, sequences):
        blocks, key_order = make_blocks(
            query, key, Sequences(**sequences), block_size=case.block_size, is_causal=case.is_causal
        )
        options = {"top_k": case.top_k, "is_causal": case.is_causal, "config": SMALL, "interpret": True}
        return routing.route(query, order_keys(key, key_order), blocks, **options)

    lengths = sequences.get("key_value_seq_lengths", np.full(case.batch, case.keys))
    is_real = np.arange(case.keys) < lengths[:, None]
    key = np.where(is_real[..., None, None], arrays["key"], 0)
    return np.asarray(call(arrays["query"], key, sequences))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_those_of_the_oracle(case):
    arrays, sequences = cases.make_inputs(case)
    expected, gap = oracle.route(arrays["query"], arrays["key"], **case.options, **sequences)
    assert gap.min() > 0, "rounding may change a choice: take another seed"
    np.testing.assert_array_equal(route(case, arrays, sequences), expected)


def test_zeros_of_either_sign_tie_S3():
    key = np.array([0.0, -0.0, 0.0, -0.0, -1.0], np.float32)
    key = np.broadcast_to(key[None, :, None, None], (1, 5, 1, 8))
    case = Case("zeros", batch=1, queries=2, keys=5, heads=1, kv_heads=1, block_size=1, top_k=5, is_causal=False)
    query = np.stack([np.ones((1, 1, 8)), -np.ones((1, 1, 8))], axis=1).astype(np.float32)
    indices = route(case, {"query": query, "key": key}, {})
    np.testing.assert_array_equal(indices[0, 0], [[0, 1, 2, 3, 4], [4, 0, 1, 2, 3]])


def test_means_of_bfloat16_keys_keep_their_float32_bits_S8():
    """Two means that differ by 2^-20 of their size are told apart, which takes all three parts of a mean."""
    key = np.zeros((1, 4, 1, 8), cases.as_dtype("bfloat16"))
    key[0, :, 0, 0] = [1, 0, 1, 2**-20]
    case = Case("bits", batch=1, queries=1, keys=4, heads=1, kv_heads=1, block_size=2, top_k=2, is_causal=False)
    query = np.ones((1, 1, 1, 8), cases.as_dtype("bfloat16"))
    np.testing.assert_array_equal(route(case, {"query": query, "key": key}, {})[0, 0, 0], [1, 0])


@pytest.mark.parametrize(
    ("shape", "dtype", "top_k", "reason"),
    [
        ((1, 16, 1, 64), "float64", 1, "float64"),
        ((1, 16, 1, 257), "float32", 1, "head_dim=257"),
        ((1, 16, 1, 64), "float32", 65, "top_k=65"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(shape, dtype, top_k, reason):
    array = np.zeros(shape, dtype)
    blocks = whole_rows(array, array, block_size=16, is_causal=True)
    with pytest.raises(NotImplementedError, match=reason):
        routing.route(array, array, blocks, top_k=top_k, is_causal=True)
