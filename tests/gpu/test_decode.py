"""The GPU kernel for a few new tokens and a cache, interpreted on a CPU, against loops in NumPy."""

import functools

import jax
import pytest

from pallas_kernels.config import TritonConfig
from pallas_kernels.gpu.triton import decode
from tests import cases, few_rows

pytestmark = pytest.mark.timeout(120)

# Tiles of 16 rows, blocks in parts of 16 keys.
SMALL = TritonConfig(tile_size=16, key_size=16, backward_tile_size=16, merge_rows=16)
CASES = (
    *few_rows.CASES,
    few_rows.Case(group=3, num_queries=2, block_size=20, top_k=3, head_dim=20, value_head_dim=12, dtype="float16"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_those_of_the_oracle(case, monkeypatch):
    monkeypatch.setattr(decode, "_PROGRAMS", 4 * few_rows.BATCH * few_rows.KV_HEADS)  # four splits, or two of two tiles
    arguments, expected = few_rows.draw(case)
    options = {"scale": 0.3, "config": SMALL, "interpret": jax.default_backend() != "gpu"}
    output = jax.jit(functools.partial(decode.attend, **options))(*arguments)
    assert output.dtype == case.dtype
    cases.assert_close(output, expected, case.dtype)
