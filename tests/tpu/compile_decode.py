"""Compiles a decode step for chips that are not here, and prints its kernels and its memory.

`python -m tests.tpu.compile_decode`
"""

import tests.tpu.libtpu_environment  # isort: skip  # noqa: F401

import functools
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from sparse_attn.attend.backends import TpuKernels
from sparse_attn.decode import extend_moba_cache, init_moba_cache, moba_cached_attention

# Topology, dtype, head_dim, value_head_dim, block_size, group, queries.
VARIANTS = (
    ("v5e:1x1", "bfloat16", 128, 128, 128, 8, 1),
    ("v5p:2x2x1", "float32", 128, 128, 16, 1, 4),
    ("v6e:1x1", "bfloat16", 128, 256, 512, 8, 16),
    ("tpu7x:2x2x1", "bfloat16", 256, 256, 48, 3, 2),
)
BATCH, KV_HEADS, NUM_BLOCKS, TOP_K = 2, 2, 200, 8


def compile_step(
    topology: str, dtype: str, head_dim: int, value_head_dim: int, block_size: int, group: int, queries: int
) -> tuple[set[str], int, int]:
    """A step that adds tokens to a donated cache and attends to it.

    Returns:
      The names of its kernels; the bytes that the program takes besides arguments and results; those of the smaller one
      of the cache's keys and values. A program that copied, padded or transposed an array of the cache's size would
      take at least as many.
    """
    sharding = SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])

    def step(cache, query, key, value):
        cache = extend_moba_cache(cache, key, value)
        return moba_cached_attention(query, cache, top_k=TOP_K, implementation=TpuKernels()), cache

    def array(heads: int, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((BATCH, queries, heads, size), jnp.dtype(dtype))

    sizes = {"block_size": block_size, "value_head_dim": value_head_dim, "dtype": dtype}
    make = functools.partial(init_moba_cache, BATCH, NUM_BLOCKS * block_size, KV_HEADS, head_dim, **sizes)
    cache = jax.eval_shape(make)
    tokens = (KV_HEADS * group, head_dim), (KV_HEADS, head_dim), (KV_HEADS, value_head_dim)
    arguments = cache, *(array(*size) for size in tokens)
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    arguments = jax.tree.map(lambda x: place(x.shape, x.dtype), arguments)
    lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
    spare = lowered.compile().memory_analysis().temp_size_in_bytes
    kernels = set(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))
    return kernels, spare, min(array.size * array.dtype.itemsize for array in (cache.key, cache.value))


if __name__ == "__main__":
    for variant in VARIANTS:
        kernels, spare, cache = compile_step(*variant)
        print(variant[0], *sorted(kernels), spare, cache, flush=True)
