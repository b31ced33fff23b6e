"""Compiles the kernels for choices made by every query for chips that are not here, and prints each program's kernels.

`python -m tests.tpu.compile_per_query`; with the word `all`, every variant for every chip, and the chunk that fills a
chip of 128 MiB (some minutes).
"""

import tests.tpu.libtpu_environment  # isort: skip  # noqa: F401

import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.config import PER_QUERY, PerQueryConfig
from pallas_kernels.tpu.per_query.backward import attend_backward
from pallas_kernels.tpu.per_query.forward import attend_forward
from tests.cases import abstract_blocks

CHIPS = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1")
SMALL = PerQueryConfig(tile_size=32, slots_per_step=64, backward_tile_size=32)
# dtype, head_dim, block_size, is_packed, config
DEFAULT_SIZES = ("bfloat16", 128, 128, False, PER_QUERY)
VARIANTS = (
    ("bfloat16", 256, 64, True, SMALL),
    ("bfloat16", 96, 24, False, SMALL),
    ("float32", 256, 512, False, SMALL),
    ("float32", 64, 128, True, SMALL),
    ("bfloat16", 64, 16, False, SMALL),
    ("float32", 96, 64, False, SMALL),
    ("float32", 128, 1000, True, SMALL),
    ("bfloat16", 224, 1024, False, SMALL),
)
TOKENS, HEADS, TOP_K = 1024, 2, 3
LARGE = PerQueryConfig(chunk_bytes=114 << 20)  # what `chunks` takes on a v5e or v6e at block 128


def compile_kernels(
    topology: str,
    dtype: str,
    head_dim: int,
    block_size: int,
    is_packed: bool,
    config: PerQueryConfig,
    tokens: int = TOKENS,
) -> set[str]:
    """Names of the kernels in the program compiled for the topology."""
    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])

    def array(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    query, key = (array(1, tokens, heads, head_dim, dtype=dtype) for heads in (HEADS, 1))
    log_sum_exp = array(1, tokens, HEADS, dtype="float32")
    blocks = abstract_blocks(array, tokens, tokens, block_size, num_blocks=tokens if is_packed else None)
    options = {"scale": 0.1, "config": config}

    def run(query, key, indices, log_sum_exp, blocks):
        arrays = query, key, key
        forward = attend_forward(arrays, indices, blocks, **options)
        return forward, attend_backward(arrays, indices, blocks, forward, (query, log_sum_exp), **options)

    program = jax.jit(run).lower(query, key, array(1, HEADS, tokens, TOP_K), log_sum_exp, blocks)
    program.compile()
    return set(re.findall(r'kernel_name = "(\w+)"', program.as_text()))


if __name__ == "__main__":
    for number, chip in enumerate(CHIPS):
        every = (DEFAULT_SIZES, *VARIANTS)
        for variant in every if sys.argv[1:] == ["all"] else every[number : number + 1]:
            print(chip, *sorted(compile_kernels(chip, *variant)), flush=True)
    for chip in ("v5e:1x1", "v6e:1x1") if sys.argv[1:] == ["all"] else ():
        print(chip, *sorted(compile_kernels(chip, *DEFAULT_SIZES[:-1], LARGE, tokens=1 << 17)), flush=True)
