"""The Mosaic GPU kernels that attend, interpreted on a CPU with race detection, against loops in NumPy.

The interpreter knows the memories, the warpgroups and the barriers, but neither wgmma nor lane code: products and the
copies of rows are replaced by plain ones. What is left to a GPU to prove are those few functions of `mosaic_tiles`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.config import MosaicConfig
from pallas_kernels.gpu import mosaic_forward
from sparse_attn import pallas
from sparse_attn.attention import _prepare
from tests import cases
from tests.cases import Case
from tests.gpu.test_attend import expected, inputs

if jax.__version_info__ < (0, 11):
    pytest.skip("the Mosaic interpreter of jax 0.10 knows no slice that starts at a number", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # races have no public name yet

pytestmark = pytest.mark.timeout(120, method="thread")  # a deadlock hangs outside Python


def product(a, b):
    return jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)


def add_product(total, a, b):
    return total + product(a, b)


def load_numbers(ref, layout):
    return ref[...]


def zeros(rows, columns):
    return jnp.zeros((rows, columns))


def ranks(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def copy_listed_rows(source_ref, row_ref, first, target_ref):
    rows = row_ref[pl.ds(first, target_ref.shape[0])]
    copied = source_ref[...].at[jnp.maximum(rows, 0)].get()
    target_ref[...] = jnp.where(rows[:, None] >= 0, copied, 0)


def copy_block(source_ref, first, stride, length, target_ref):
    rank = jnp.arange(target_ref.shape[0])
    is_real = rank < length
    copied = source_ref[...].at[jnp.where(is_real, first + rank * stride, 0)].get()
    target_ref[...] = jnp.where(is_real[:, None], copied, 0)


def close_copies(in_flight):
    plgpu.commit_smem()


def write_rows(source_ref, place_ref, target_ref):
    @pl.loop(0, source_ref.shape[0])
    def _(row):
        place = place_ref[row]

        @pl.when(place >= 0)
        def _():
            target_ref[place] = source_ref[row]


def write_block(source, target_ref, first, length):
    @pl.loop(0, jnp.clip(length, 0, source.shape[0]))
    def _(row):
        target_ref[first + row] = lax.dynamic_index_in_dim(source, row, keepdims=False)


STAND_INS = {
    "product": product,
    "add_product": add_product,
    "load_numbers": load_numbers,
    "zeros": zeros,
    "ranks": ranks,
    "copy_listed_rows": copy_listed_rows,
    "copy_block": copy_block,
    "close_copies": close_copies,
    "write_rows": write_rows,
    "write_numbers": write_rows,
    "write_block": write_block,
}


# Few programs, so that each has several tiles and blocks; little memory, so that heads have several chunks.
SMALL = MosaicConfig(num_programs=2, chunk_bytes=20000)
BY_XLA = MosaicConfig(num_programs=2, gather_in_kernel=False)

CASES = (
    # Blocks cut in two.
    Case(
        "grouped_ragged",
        batch=1,
        queries=150,
        keys=150,
        heads=2,
        kv_heads=1,
        head_dim=20,
        block_size=140,
        top_k=2,
        dtype="bfloat16",
        scale=0.7,
    ),
    Case("mixed_segments", queries=36, keys=45, heads=4, block_size=4, top_k=3, sequences="mixed", dtype="float16"),
    Case(
        "all_see_lengths",
        batch=3,
        queries=29,
        keys=61,
        block_size=7,
        is_causal=False,
        sequences="lengths",
        dtype="bfloat16",
    ),
    Case("by_xla", batch=1, queries=40, keys=230, head_dim=80, block_size=100, top_k=2, dtype="float16"),
)


@functools.cache
def actual(case):
    """As `expected`, from the kernels, and whether a race was seen."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (mosaic_forward,):
            for name, stand_in in STAND_INS.items():
                if hasattr(module, name):
                    patch.setattr(module, name, stand_in)
        return run(case)


def run(case):
    arrays, sequences, selection = inputs(case)
    names = ("query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids")

    @jax.jit
    def call(arrays, selection, sequences):
        given = [sequences.get(name) for name in names]
        options = {
            "scale": case.head_dim**-0.5 if case.scale is None else case.scale,
            "config": BY_XLA if case.name == "by_xla" else SMALL,
            "interpret": plgpu.InterpretGPUParams(detect_races=True),
        }

        def attend(query, key, value):
            query, (key, value), layout = _prepare(query, (key, value), case.block_size, case.is_causal, *given)
            return pallas.attend(query, key, value, selection, layout, **options)

        return attend(*(arrays[name] for name in ("query", "key", "value")))

    results = jax.block_until_ready(call(arrays, selection, sequences))
    return results, interpret_pallas_call.get_races().races_found


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_outputs_and_log_sum_exp_are_those_of_the_oracle(case):
    (output, log_sum_exp), _ = actual(case)
    expected_output, expected_sum, _ = expected(case)
    assert output.dtype == cases.as_dtype(case.dtype)
    cases.assert_close(output, expected_output, case.dtype)
    is_empty = np.isneginf(expected_sum)
    np.testing.assert_array_equal(np.isneginf(log_sum_exp), is_empty)
    cases.assert_close(np.asarray(log_sum_exp)[~is_empty], expected_sum[~is_empty], case.dtype)
    np.testing.assert_array_equal(np.asarray(output)[is_empty], 0)


@every_case
def test_no_race(case):
    assert not actual(case)[1]
