"""Compiles the router and the query-tile-major kernels for chips that are not here, and prints each chip's kernels.

`python -m tests.tpu.compile_tiles`
"""

import tests.tpu.libtpu_environment  # isort: skip  # noqa: F401

import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.tpu.backward_tiles import attend_tiles_backward
from pallas_kernels.tpu.forward_tiles import attend_tiles_forward
from pallas_kernels.tpu.routing import route

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
    blocks = array(1, HEADS, -(-TOKENS // query_block_size), LIST)
    sizes = {"query_block_size": query_block_size, "key_block_size": key_block_size, "scale": 0.1}

    def run(query, key, blocks, numbers, log_sum_exp, block_start, block_length):
        places = {"block_start": block_start, "block_length": block_length}
        reach = {"first_block": numbers, "last_block": numbers}
        indices = route(query, key, **places, **reach, block_size=key_block_size, top_k=9, is_causal=True)
        inputs = (query, key, key, blocks, numbers, numbers, numbers)
        forward = attend_tiles_forward(*inputs, **sizes)
        return indices, forward, attend_tiles_backward(*inputs, query, log_sum_exp, query, log_sum_exp, **sizes)

    places = [array(1, -(-TOKENS // key_block_size))] * 2
    program = jax.jit(run).lower(query, key, blocks, array(1, TOKENS), log_sum_exp, *places)
    program.compile()
    return set(re.findall(r'kernel_name = "(\w+)"', program.as_text()))


if __name__ == "__main__":
    for variant in VARIANTS:
        print(variant[0], *sorted(compile_kernels(*variant)))
