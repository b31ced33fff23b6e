"""The GPU kernels are what Triton can take: lowered for CUDA, which needs neither a GPU nor its compiler."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src import mesh as mesh_lib  # AbstractDevice has no public name yet
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.gpu.backward import attend_backward
from pallas_kernels.gpu.forward import attend_forward
from pallas_kernels.gpu.routing import route

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(("dtype", "head_dim", "block_size"), [("bfloat16", 128, 128), ("float32", 80, 100)], ids=str)
def test_every_kernel_is_lowered_for_cuda(dtype, head_dim, block_size):
    batch, num_tokens, heads, kv_heads, top_k = 2, 1000, 4, 2, 8
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    query = jax.ShapeDtypeStruct((batch, num_tokens, heads, head_dim), dtype)
    key = jax.ShapeDtypeStruct((batch, num_tokens, kv_heads, head_dim), dtype)
    block, token = number((batch, -(-num_tokens // block_size))), number((batch, num_tokens))

    def run(query, key, start, length, first, last):
        places = {"block_start": start, "block_length": length, "block_size": block_size}
        indices = route(query, key, **places, first_block=first, last_block=last, top_k=top_k, is_causal=True)
        options = {**places, "key_stop": last, "is_packed": True, "scale": 0.1}
        output, log_sum_exp = attend_forward(query, key, key, indices, **options)
        results = output, log_sum_exp, output, log_sum_exp
        return attend_backward(query, key, key, indices, *results, **options)

    device = mesh_lib.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(run).trace(query, key, block, block, token, token).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    names = ("moba_block_means", "moba_route", "attend_tiles", "merge_partials", "attend_d_query", "add_up_d_query")
    for name in (*names, "attend_d_key_value"):
        assert name in text
