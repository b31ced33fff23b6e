"""The TPU router, interpreted on a CPU, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu import routing
from sparse_attn.checks import Sequences
from sparse_attn.layout import make_blocks, order_keys, whole_rows
from tests import cases, oracle
from tests.cases import Case

pytestmark = pytest.mark.timeout(120)

SMALL = routing.RoutingConfig(key_rows=32, queries=128, blocks=32)

# Query heads per key/value head: 1, 2, 3, 4, 7, 8.
CASES = (
    Case("ties", batch=1, queries=70, keys=70, heads=6, head_dim=64, block_size=4, top_k=3, exact=True),
    # Three tiles of queries, three groups of blocks, ten panels, none of the last ones full, and tiles that do not
    # reach all of them. The first query's own block is the last of a panel.
    Case("panels", batch=1, queries=260, keys=291, heads=1, kv_heads=1, block_size=1, top_k=9, exact=True),
    Case("top_64", batch=1, queries=20, keys=150, heads=1, kv_heads=1, block_size=2, top_k=64, is_causal=False),
    Case("mixed", queries=150, keys=170, heads=4, kv_heads=1, block_size=4, top_k=3, sequences="mixed"),
    Case("lengths", batch=3, heads=4, sequences="lengths", queries=37, keys=50, top_k=9, block_size=5, head_dim=96),
    Case(
        "bfloat16", 1, 60, 330, heads=7, kv_heads=1, dtype="bfloat16", exact=True, head_dim=128, block_size=4, top_k=5
    ),
    Case("more_queries", batch=1, queries=40, keys=37, heads=8, kv_heads=1, block_size=16, top_k=2),
)


def route(case, arrays, sequences, interpret):
    """Indices `[batch, heads, queries, top_k]` of the kernels, given what the library would give them."""

    @jax.jit
    def call(query, key, sequences):
        blocks, key_order = make_blocks(
            query, key, Sequences(**sequences), block_size=case.block_size, is_causal=case.is_causal
        )
        options = {"top_k": case.top_k, "is_causal": case.is_causal, "config": SMALL, "interpret": interpret}
        return routing.route(query, order_keys(key, key_order), blocks, **options)

    lengths = sequences.get("key_value_seq_lengths", np.full(case.batch, case.keys))
    is_real = np.arange(case.keys) < lengths[:, None]
    key = np.where(is_real[..., None, None], arrays["key"], 0)
    return np.asarray(call(arrays["query"], key, sequences))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_those_of_the_oracle(case, interpret):
    arrays, sequences = cases.make_inputs(case)
    expected, gap = oracle.route(arrays["query"], arrays["key"], **case.options, **sequences)
    assert gap.min() > 0, "rounding may change a choice: take another seed"
    np.testing.assert_array_equal(route(case, arrays, sequences, interpret), expected)


def test_zeros_of_either_sign_tie_S3(interpret):
    key = np.array([0.0, -0.0, 0.0, -0.0, -1.0], np.float32)
    key = np.broadcast_to(key[None, :, None, None], (1, 5, 1, 64))
    case = Case("zeros", batch=1, queries=2, keys=5, heads=1, kv_heads=1, block_size=1, top_k=5, is_causal=False)
    query = np.stack([np.ones((1, 1, 64)), -np.ones((1, 1, 64))], axis=1).astype(np.float32)
    indices = route(case, {"query": query, "key": key}, {}, interpret)
    np.testing.assert_array_equal(indices[0, 0], [[0, 1, 2, 3, 4], [4, 0, 1, 2, 3]])


def test_other_dtypes_are_refused():
    array = jnp.zeros((1, 16, 1, 64), jnp.float16)
    blocks = whole_rows(array, array, block_size=16, is_causal=True)
    with pytest.raises(NotImplementedError, match="float16"):
        routing.route(array, array, blocks, top_k=1, is_causal=True)
