"""What is timed on an accelerator: the inputs of a problem, and the calls."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels.roofline import Problem
from sparse_attn import BlockSelection, block_sparse_attention, route_moba
from sparse_attn.attend.backends import Implementation, TritonKernels
from sparse_attn.layout import whole_rows

Arrays = dict[str, jax.Array]


def make_arrays(problem: Problem) -> Arrays:
    """Query, key, value and gradient of the output in bfloat16, of causal sequences."""
    shape = (problem.batch, problem.sequence, problem.heads, problem.head_dim)
    names = ("query", "key", "value", "d_output")
    return {name: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed, name in enumerate(names)}


def make_calls(problem: Problem, implementation: Implementation) -> dict[str, Callable[..., Any]]:
    """The calls by name. Each takes the arrays of `make_arrays`; those of `takes_choice` take the choice as well.

    "schedule" and "schedule_attend" are the forward pass of the Triton kernels up to there; others have no such parts.
    """
    options: dict[str, Any] = {"is_causal": True, "implementation": implementation}
    sizes: dict[str, Any] = {"block_size": problem.block_size, "top_k": problem.top_k}

    def choose(a: Arrays) -> jax.Array:
        return route_moba(a["query"], a["key"], **sizes, **options).indices

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, indices: jax.Array) -> jax.Array:
        selection = BlockSelection(indices, problem.block_size, problem.num_blocks)
        output: jax.Array = block_sparse_attention(query, key, value, selection, **options)
        return output

    def forward(a: Arrays, indices: jax.Array) -> jax.Array:
        return attend(a["query"], a["key"], a["value"], indices)

    def differentiate(a: Arrays, indices: jax.Array) -> tuple[jax.Array, ...]:
        arrays = a["query"], a["key"], a["value"]
        return jax.vjp(lambda q, k, v: attend(q, k, v, indices), *arrays)[1](a["d_output"])

    return {
        "route": choose,
        **(_stages(problem, implementation) if isinstance(implementation, TritonKernels) else {}),
        "forward": forward,
        "forward_backward": differentiate,
        "whole_forward": lambda a: forward(a, choose(a)),
        "whole_forward_backward": lambda a: differentiate(a, choose(a)),
    }


def _stages(problem: Problem, kernels: TritonKernels) -> dict[str, Callable[..., Any]]:
    """The first parts of the Triton kernels' forward pass."""
    from pallas_kernels.gpu.chunks import Chunk, for_chunks
    from pallas_kernels.gpu.tiles import padded_head_dim
    from pallas_kernels.gpu.triton.forward import attend_chunks

    options: dict[str, Any] = {
        "scale": problem.head_dim**-0.5,
        "config": kernels.config,
        "interpret": kernels.interpret,
    }

    def over_chunks(a: Arrays, indices: jax.Array, keep: Callable[..., jax.Array]) -> jax.Array:
        """Sums one number per chunk, so that XLA cannot drop the work as unused."""
        blocks = whole_rows(a["query"], a["key"], block_size=problem.block_size, is_causal=True)
        plan, attend_chunk = attend_chunks((a["query"], a["key"], a["value"]), indices, blocks, **options)
        sizes = kernels.config.for_rows(padded_head_dim(problem.head_dim), a["query"].dtype.itemsize)

        def add(chunk: Chunk, total: jax.Array) -> jax.Array:
            return total + keep(chunk, attend_chunk).astype(jnp.float32)

        return for_chunks(plan, indices, sizes.tile_size, add, jnp.float32(0))

    def schedule_only(a: Arrays, indices: jax.Array) -> jax.Array:
        return over_chunks(a, indices, lambda chunk, _: chunk.schedule.pair.sum() + chunk.schedule.block.sum())

    def without_merge(a: Arrays, indices: jax.Array) -> jax.Array:
        def keep(chunk: Chunk, attend_chunk: Callable[[Chunk], tuple[jax.Array, jax.Array]]) -> jax.Array:
            output, log_sum_exp = attend_chunk(chunk)
            return output[0, 0].astype(jnp.float32) + log_sum_exp[0]

        return over_chunks(a, indices, keep)

    return {"schedule": schedule_only, "schedule_attend": without_merge}


def takes_choice(name: str) -> bool:
    """Whether a call of `make_calls` takes the choice after the arrays."""
    return name in ("schedule", "schedule_attend", "forward", "forward_backward")


def dense_attention() -> Callable[..., jax.Array]:
    """The platform's dense causal attention: cuDNN's, splash attention, or XLA's."""
    if jax.default_backend() == "gpu":
        return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    if jax.default_backend() != "tpu":
        return functools.partial(jax.nn.dot_product_attention, is_causal=True)
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        tokens, heads, head_dim = query.shape[1:]
        mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens))] * heads)
        kernel = splash.make_splash_mha_single_device(mask=mask)
        by_head = (array.swapaxes(1, 2) for array in (query * head_dim**-0.5, key, value))
        return jax.vmap(kernel)(*by_head).swapaxes(1, 2)

    return attend


def dense_calls() -> dict[str, Callable[..., Any]]:
    """The platform's dense causal attention on the same arrays."""
    attend = dense_attention()

    def differentiate(a: Arrays) -> tuple[jax.Array, ...]:
        return jax.vjp(attend, a["query"], a["key"], a["value"])[1](a["d_output"])

    return {
        "dense_forward": lambda a: attend(a["query"], a["key"], a["value"]),
        "dense_forward_backward": differentiate,
    }
