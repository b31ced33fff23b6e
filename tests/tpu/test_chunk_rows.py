"""Queries on their way to the chip and outputs on their way back, in several pieces, interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.per_query import chunk_rows
from pallas_kernels.tpu.per_query.memory import LANES, SPARE_ROWS
from tests import cases

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(("num_pieces", "piece_rows"), [(1, 384), (2, 128), (5, 128), (3, 256)])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 96), ("float32", 128)])
def test_every_piece_arrives(dtype, head_dim, num_pieces, piece_rows, interpret):
    """Words of the rows, spare rows included, and outputs of states of which the first three are empty."""
    random = np.random.default_rng(0)
    rows = num_pieces * piece_rows
    words, parts, state_parts = (48, 1, 1) if dtype == "bfloat16" else (128, 2, 2)
    query = random.standard_normal((rows, head_dim)).astype(cases.as_dtype(dtype))
    key_stop = random.integers(0, 1 << 30, rows, dtype=np.int32)
    state = random.standard_normal((rows + SPARE_ROWS, state_parts * LANES)).astype(np.float32)
    state[:, head_dim:] = np.abs(state[:, head_dim : head_dim + 1]) + 1  # sum of weights
    state[:, -1] = random.standard_normal(rows + SPARE_ROWS)  # maximum
    state[:3, :-1] = 0

    def kernel(query_hbm, key_stop_hbm, state_ref, output_hbm, log_sum_exp_hbm, rows_ref, buffers):
        chunk_rows.load(query_hbm, key_stop_hbm, rows_ref, buffers)
        chunk_rows.finish(state_ref, output_hbm, log_sum_exp_hbm, buffers)

    in_hbm, in_vmem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    pieces = query.reshape(num_pieces, piece_rows, head_dim), key_stop.reshape(num_pieces, -1, LANES)
    output, log_sum_exp, row = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct(pieces[0].shape, query.dtype),
            jax.ShapeDtypeStruct(pieces[1].shape, jnp.float32),
            jax.ShapeDtypeStruct(((rows + SPARE_ROWS) * parts, LANES), jnp.uint32),
        ),
        in_specs=[in_hbm, in_hbm, in_vmem],
        out_specs=(in_hbm, in_hbm, in_vmem),
        scratch_shapes=[chunk_rows.Buffers.allocate(*pieces)],
        interpret=interpret,
    )(*pieces, state.reshape(-1, LANES))

    row = np.asarray(row).reshape(-1, parts * LANES)
    if dtype == "float32":
        want = query.view(np.uint32)
    else:
        bits = query.view(np.uint16).astype(np.uint32)
        want = bits[:, :words] | (bits[:, words:] << 16)
    np.testing.assert_array_equal(row[:rows, :words], want)
    np.testing.assert_array_equal(row[:rows, words], key_stop)
    assert not row[rows:].any()
    total, largest = state[3:rows, head_dim].astype(np.float64), state[3:rows, -1]
    output, log_sum_exp = np.asarray(output).reshape(rows, -1), np.asarray(log_sum_exp).reshape(rows)
    cases.assert_close(output[3:], state[3:rows, :head_dim] / total[:, None], dtype)
    cases.assert_close(log_sum_exp[3:], largest * np.log(2) + np.log(total), "float32")
    assert not output[:3].any()
    assert np.isneginf(log_sum_exp[:3]).all()


@pytest.mark.parametrize("num_rows", [640, 1024, 33 * 1024])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 32), ("float32", 256)])
def test_pieces_of_long_chunks_are_whole_groups_of_a_quarter_to_half_a_megabyte(num_rows, dtype, head_dim):
    piece = chunk_rows.choose_piece_rows(num_rows, head_dim, cases.as_dtype(dtype), None)
    assert num_rows % piece == piece % chunk_rows.GROUP == 0
    size = piece * max(head_dim, LANES) * cases.as_dtype(dtype).itemsize
    assert piece == num_rows <= 1024 or 1 << 18 <= size <= 1 << 19
