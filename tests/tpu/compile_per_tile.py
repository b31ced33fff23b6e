"""Compiles the router and the kernels for choices made per tile, for chips that are not here; prints their kernels.

`python -m tests.tpu.compile_per_tile`
"""

import tests.tpu.libtpu_environment  # isort: skip  # noqa: F401

import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.tpu.per_tile.backward import attend_tiles_backward
from pallas_kernels.tpu.per_tile.forward import attend_tiles_forward
from pallas_kernels.tpu.routing import route
from tests.cases import abstract_blocks

# Topology, dtype, head_dim, query_block_size, key_block_size.
VARIANTS = (
    ("v5e:2x2", "float32", 64, 64, 64),
    ("v5p:2x2x1", "bfloat16", 96, 64, 128),
    ("v6e:1x1", "bfloat16", 128, 512, 512),
    ("tpu7x:2x2x1", "bfloat16", 256, 600, 48),
)
TOKENS, HEADS, KV_HEADS, LIST = 2048, 4, 2, 3


def compile_kernels(topology: str, dtype: str, head_dim: int, query_block_size: int, key_block_size: int) -> set[str]:
    """Names of the kernels in the programs compiled for the topology."""
    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])

    def array(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    query = array(1, TOKENS, HEADS, head_dim, dtype=dtype)
    key = array(1, TOKENS, KV_HEADS, head_dim, dtype=dtype)
    log_sum_exp = array(1, TOKENS, HEADS, dtype="float32")
    lists = array(1, HEADS, -(-TOKENS // query_block_size), LIST)
    blocks = abstract_blocks(array, TOKENS, TOKENS, key_block_size)

    def run(query, key, lists, log_sum_exp, blocks):
        indices = route(query, key, blocks, top_k=9, is_causal=True)
        choice, results = ((query, key, key), lists, blocks, query_block_size), (query, log_sum_exp)
        forward = attend_tiles_forward(*choice, scale=0.1)
        return indices, forward, attend_tiles_backward(*choice, results, results, scale=0.1)

    program = jax.jit(run).lower(query, key, lists, log_sum_exp, blocks)
    program.compile()
    return set(re.findall(r'kernel_name = "(\w+)"', program.as_text()))


if __name__ == "__main__":
    for variant in VARIANTS:
        print(variant[0], *sorted(compile_kernels(*variant)))
