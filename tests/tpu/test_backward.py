"""The key-major TPU backward kernel, interpreted on a CPU, against the oracle's hand-written gradients."""

import functools

import jax
import numpy as np
import pytest

from sparse_attn import pallas
from tests import cases
from tests.tpu.key_major import CASES, SMALL, expected, make_inputs, prepare, scale_of

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("strict_ranks")]


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
        backend = pallas.PerQueryKernels(scale_of(case), config=SMALL, interpret=interpret)
        cotangents = arrays["d_output"], arrays["d_log_sum_exp"]
        d_prepared = backend.backward(prepared, (indices, layout), (output, log_sum_exp), cotangents)
        return pull_back(d_prepared)

    output, log_sum_exp = output.astype(arrays["query"].dtype), log_sum_exp.astype(np.float32)
    actual = call(arrays, selection, output, log_sum_exp, sequences)
    for gradient, want in zip(actual, gradients, strict=True):
        assert gradient.dtype == cases.as_dtype(case.dtype)
        cases.assert_close(gradient, want, case.dtype)
