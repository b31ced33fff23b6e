"""The TPU kernel for a few new tokens and a cache, interpreted on a CPU, against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tpu import decode
from sparse_attn.attend.backends import TpuKernels, resolve
from tests import cases, few_rows

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("case", few_rows.CASES, ids=str)
def test_outputs_are_those_of_the_oracle(case, interpret):
    arguments, expected = few_rows.draw(case)
    options = {"scale": 0.3, "keys_per_step": 3 * case.block_size, "interpret": interpret}
    output = jax.jit(functools.partial(decode.attend, **options))(*arguments)
    assert output.dtype == case.dtype
    cases.assert_close(output, expected, case.dtype)


@pytest.mark.parametrize(("group", "num_queries"), few_rows.GROUPS)
def test_steps_and_drafts_equal_whole_rows(group, num_queries, interpret):
    few_rows.check_the_law(TpuKernels(interpret=interpret), group, num_queries)


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((4, 16, 128, 128), jnp.float16, "float16"),
        ((4, 24, 128, 128), jnp.bfloat16, "block_size=24"),
        ((4, 16, 64, 128), jnp.float32, "head_dim=64"),
        ((4, 16, 128, 192), jnp.float32, "value_head_dim=192"),
        ((4, 8192, 256, 256), jnp.float32, "block_size=8192"),
        ((1 << 17, 16, 128, 128), jnp.bfloat16, "steps, got 655360"),
    ],
)
def test_what_the_kernel_cannot_do_is_said_and_goes_to_xla(sizes, dtype, reason):
    batch, block_size, head_dim, value_head_dim = sizes
    shapes = (batch, 1, 1, head_dim), (batch, 1, 9, block_size, head_dim), (batch, 1, 9, block_size, value_head_dim)
    arrays = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    indices = jax.ShapeDtypeStruct((batch, 1, 1, 2), jnp.int32)
    assert reason in TpuKernels().refuses_decode(arrays, indices)
    assert resolve(None).refuses_decode(arrays, indices) is None
