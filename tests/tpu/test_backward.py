"""The key-major TPU backward kernel, interpreted on a CPU, against the oracle's hand-written gradients."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.tpu.backward import _parts
from pallas_kernels.tpu.key_work import LANES, round_up
from sparse_attn import pallas
from tests import cases
from tests.tpu.key_major import CASES, expected, make_inputs, prepare, scale_of, with_chunks

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("strict_ranks")]

# Rows of a chunk: three chunks or more, the last one shorter. In the large ones a block has three tiles or more.
CHUNK_ROWS = {"packed": 32, "lengths": 24, "odd_blocks": 88, "pieces": 88, "wide": 8, "wide_bfloat16": 16}


def config_of(case):
    parts = _parts(case.head_dim, cases.as_dtype(case.dtype))
    return with_chunks(CHUNK_ROWS[case.name], 4 * (parts * LANES + round_up(case.head_dim, LANES)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_oracle(case, interpret):
    arrays, sequences, selection = make_inputs(case)
    output, log_sum_exp, gradients = expected(case)

    @jax.jit
    def call(arrays, indices, output, log_sum_exp, sequences):
        prepared, pull_back, layout = jax.vjp(
            functools.partial(prepare, case, sequences=sequences),
            *(arrays[name] for name in ("query", "key", "value")),
            has_aux=True,
        )
        backend = pallas.PerQueryKernels(scale_of(case), config=config_of(case), interpret=interpret)
        cotangents = arrays["d_output"], arrays["d_log_sum_exp"]
        d_prepared = backend.backward(prepared, (indices, layout), (output, log_sum_exp), cotangents)
        return pull_back(d_prepared)

    output, log_sum_exp = output.astype(arrays["query"].dtype), log_sum_exp.astype(np.float32)
    actual = call(arrays, selection, output, log_sum_exp, sequences)
    for gradient, want in zip(actual, gradients, strict=True):
        assert gradient.dtype == cases.as_dtype(case.dtype)
        cases.assert_close(gradient, want, case.dtype)
