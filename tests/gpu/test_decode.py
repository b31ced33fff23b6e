"""The GPU kernel for a few new tokens and a cache, interpreted on a CPU, against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.config import TritonConfig
from pallas_kernels.gpu.triton import decode
from sparse_attn.attend.backends import MosaicKernels, TritonKernels
from tests import cases, few_rows

pytestmark = pytest.mark.timeout(120)

# Tiles of 16 rows, blocks in parts of 16 keys.
SMALL = TritonConfig(tile_size=16, key_size=16, backward_tile_size=16, merge_rows=16)
TRITON = TritonKernels(SMALL, interpret=jax.default_backend() != "gpu")
CASES = (
    *few_rows.CASES,
    few_rows.Case(group=3, num_queries=2, block_size=20, top_k=3, head_dim=20, value_head_dim=12, dtype="float16"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_those_of_the_oracle(case, monkeypatch):
    monkeypatch.setattr(decode, "_PROGRAMS", 4 * few_rows.BATCH * few_rows.KV_HEADS)  # four splits, or two of two tiles
    arguments, expected = few_rows.draw(case)
    options = {"scale": 0.3, "config": SMALL, "interpret": TRITON.interpret}
    output = jax.jit(functools.partial(decode.attend, **options))(*arguments)
    assert output.dtype == case.dtype
    cases.assert_close(output, expected, case.dtype)


@pytest.mark.parametrize(("group", "num_queries"), few_rows.GROUPS)
def test_steps_and_drafts_equal_whole_rows(group, num_queries):
    few_rows.check_the_law(TRITON, group, num_queries)


def test_mosaic_decodes_by_triton():
    arguments, expected = few_rows.draw(CASES[-1])
    output = MosaicKernels(router=TRITON).decode(*arguments, 0.3)
    cases.assert_close(output, expected, CASES[-1].dtype)


@pytest.mark.parametrize(
    ("head_dim", "value_head_dim", "dtype", "top_k", "reason"),
    [
        (64, 64, jnp.int8, 2, "int8"),
        (257, 64, jnp.float32, 2, "head_dim=257"),
        (64, 257, jnp.float32, 2, "value_head_dim=257"),
        (64, 64, jnp.float32, 65, "top_k=65"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(head_dim, value_head_dim, dtype, top_k, reason):
    shapes = (2, 1, 1, head_dim), (2, 1, 99, 8, head_dim), (2, 1, 99, 8, value_head_dim)
    arrays = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    indices = jax.ShapeDtypeStruct((2, 1, 1, top_k), jnp.int32)
    for backend in (TritonKernels(), MosaicKernels()):
        assert reason in backend.refuses_decode(arrays, indices)
