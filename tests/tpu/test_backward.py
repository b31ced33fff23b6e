"""The TPU backward kernel for choices made by every query, interpreted on a CPU, against hand-written gradients."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.tpu.per_query.backward import _parts
from pallas_kernels.tpu.per_query.memory import LANES, round_up
from sparse_attn.attend.backends import TpuKernels
from sparse_attn.attend.choice import PerQuery
from tests import attend, cases
from tests.tpu.per_query import CASES, LOUD, with_chunks

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("strict_ranks")]

# Rows of a chunk: three chunks or more, the last one shorter. In the large ones a block has three tiles or more.
CHUNK_ROWS = {"packed": 32, "lengths": 24, "odd_blocks": 88, "pieces": 88, "wide": 8, "wide_bfloat16": 16}


def config_of(case):
    parts = _parts(case.head_dim, cases.as_dtype(case.dtype))
    return with_chunks(CHUNK_ROWS[case.name], 4 * (parts * LANES + round_up(case.head_dim, LANES)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_oracle(case, interpret):
    arrays, sequences, selection = attend.inputs(case, LOUD)
    output, log_sum_exp, _ = attend.expected(case, LOUD)
    backend = TpuKernels(config_of(case), interpret=interpret)

    @jax.jit
    def call(arrays, indices, output, log_sum_exp, sequences):
        prepared, pull_back, blocks = jax.vjp(
            functools.partial(attend.prepare, case, sequences=sequences),
            *(arrays[name] for name in ("query", "key", "value")),
            has_aux=True,
        )
        cotangents, choice = (arrays["d_output"], arrays["d_log_sum_exp"]), PerQuery(indices, blocks)
        return pull_back(backend.backward(prepared, choice, (output, log_sum_exp), cotangents, attend.scale_of(case)))

    output, log_sum_exp = output.astype(arrays["query"].dtype), log_sum_exp.astype(np.float32)
    attend.check_gradients(case, call(arrays, selection, output, log_sum_exp, sequences), LOUD)
