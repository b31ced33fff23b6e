"""The GPU kernels that attend, on a GPU or interpreted on a CPU, against loops in NumPy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pallas_kernels.config import TRITON, TritonConfig
from sparse_attn.attend.backends import TritonKernels
from tests import attend, cases
from tests.backends import needs_triton
from tests.cases import Case

pytestmark = [pytest.mark.timeout(120), needs_triton]

# Small, so that a chunk of 60 rows has several groups of rows to merge, a block several tiles and parts of keys.
SMALL = TritonConfig(tile_size=16, key_size=16, backward_tile_size=16, merge_rows=16)
CHUNK_ROWS = 60

# Query heads per key/value head: 7, 4, 1, 3, 8, 2. Heads have three or four chunks, the last one shorter, but for
# "all_see_lengths", which has three chunks of two heads. In "grouped_ragged" and "wide" a block has three parts of
# keys, the last of eight, and in the first one three tiles, the last of which is not full.
CASES = (
    Case("grouped_ragged", 1, 25, 50, heads=14, head_dim=20, block_size=40, top_k=4, scale=0.7),
    Case("mixed_segments", batch=3, queries=37, keys=45, heads=8, block_size=4, top_k=3, sequences="mixed"),
    Case("all_see_lengths", batch=3, queries=29, keys=61, block_size=7, is_causal=False, sequences="lengths"),
    Case("wide", batch=1, queries=67, keys=50, heads=3, kv_heads=1, head_dim=256, block_size=40, top_k=1),
    Case("bfloat16", batch=1, dtype="bfloat16", heads=8, kv_heads=1, queries=22, keys=48, block_size=16, top_k=3),
    # With the default sizes, all heads in one chunk.
    Case("default_float16", 2, 40, 48, heads=4, dtype="float16", sequences="segments", block_size=1, top_k=5),
)


def draw_call(seed):
    """Shape and sizes at random."""
    random = np.random.default_rng(seed)
    kv_heads = int(random.integers(1, 3))
    numbers = {"batch": (1, 3), "queries": (1, 50), "keys": (1, 70), "head_dim": (1, 40), "block_size": (1, 50)}
    case = Case(
        f"random_{seed}",
        heads=kv_heads * int(random.choice((1, 2, 3, 4, 7, 8))),
        kv_heads=kv_heads,
        top_k=int(random.integers(1, 5)),
        is_causal=bool(random.integers(2)),
        dtype=str(random.choice(("float32", "bfloat16", "float16"))),
        sequences=str(random.choice(("full", "lengths", "segments", "mixed"))),
        **{name: int(random.integers(*bounds)) for name, bounds in numbers.items()},
    )
    names = ("tile_size", "key_size", "backward_tile_size", "merge_rows")
    sizes = TritonConfig(**{name: int(random.choice((16, 32))) for name in names})
    return case, with_chunks(case, sizes, num_rows=int(random.integers(5, 60)))


def with_chunks(case, config, num_rows):
    """The sizes with chunks of so many rows at most."""
    row_bytes = case.top_k * (case.head_dim * cases.as_dtype(case.dtype).itemsize + 16)
    return dataclasses.replace(config, chunk_bytes=num_rows * row_bytes)


@functools.cache
def actual(case):
    config = TRITON if case.name.startswith("default") else with_chunks(case, SMALL, CHUNK_ROWS)
    return attend.run(case, TritonKernels(config, interpret=jax.default_backend() != "gpu"))


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_outputs_and_log_sum_exp_are_those_of_the_oracle(case):
    attend.check_results(case, *actual(case)[:2])


@every_case
def test_gradients_are_those_of_the_oracle(case):
    attend.check_gradients(case, actual(case)[2])


@pytest.mark.parametrize("seed", range(5))
def test_shapes_and_sizes_at_random(seed):
    case, config = draw_call(seed)
    output, log_sum_exp, gradients = attend.run(case, TritonKernels(config, interpret=jax.default_backend() != "gpu"))
    attend.check_results(case, output, log_sum_exp)
    attend.check_gradients(case, gradients)
