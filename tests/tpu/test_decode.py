"""The TPU kernel for a few new tokens and a cache, interpreted on a CPU, against loops in NumPy."""

import functools

import jax
import pytest

from pallas_kernels.tpu import decode
from tests import cases, few_rows

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("case", few_rows.CASES, ids=str)
def test_outputs_are_those_of_the_oracle(case, interpret):
    arguments, expected = few_rows.draw(case)
    options = {"scale": 0.3, "keys_per_step": 3 * case.block_size, "interpret": interpret}
    output = jax.jit(functools.partial(decode.attend, **options))(*arguments)
    assert output.dtype == case.dtype
    cases.assert_close(output, expected, case.dtype)
