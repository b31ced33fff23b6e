"""What is checked and timed on a GPU: the inputs of a problem, the calls, and the results they must give."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.kernels.roofline import Problem
from pallas_kernels.blocks import Blocks, Results
from pallas_kernels.config import TRITON, MosaicConfig, TritonConfig
from pallas_kernels.gpu.chunks import Chunk, for_chunks
from pallas_kernels.gpu.mosaic import backward as mosaic_backward
from pallas_kernels.gpu.mosaic import forward as mosaic_forward
from pallas_kernels.gpu.tiles import padded_head_dim
from pallas_kernels.gpu.triton import backward, forward
from pallas_kernels.gpu.triton.routing import route
from sparse_attn.layout import whole_rows

Arrays = dict[str, jax.Array]
# Largest error of a 16-bit result, relative to the largest expected value or to 1 if that is smaller. Products round
# their inputs and results to bfloat16, each by up to 2^-9 relative.
_TOLERANCE = 2e-2


def make_arrays(problem: Problem) -> Arrays:
    """Query, key, value and gradient of the output in bfloat16, of causal sequences.

    Values are random multiples of 1/8, so that router scores are exact in float32 in any order of summation, and only
    one choice is right.
    """
    shape = (problem.batch, problem.sequence, problem.heads, problem.head_dim)
    names = ("query", "key", "value", "d_output")
    arrays = {name: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed, name in enumerate(names)}
    arrays = {name: jnp.round(8 * array) / 8 for name, array in arrays.items()}
    return arrays


def make_calls(
    problem: Problem, config: TritonConfig | MosaicConfig, interpret: Any = False
) -> dict[str, Callable[..., Any]]:
    """The calls by name. Each takes the arrays of `make_arrays`; those of `takes_choice` take the choice as well.

    Args:
      problem: what to compute.
      config: sizes of the kernels; its type decides between Triton and Mosaic. Mosaic kernels use Triton's router with
        its default sizes, and their stages cannot be called one by one.
      interpret: as in the kernels.
    """
    is_mosaic = isinstance(config, MosaicConfig)
    attend_forward: Callable[..., Any] = (mosaic_forward if is_mosaic else forward).attend_forward
    attend_backward: Callable[..., Any] = (mosaic_backward if is_mosaic else backward).attend_backward
    options: dict[str, Any] = {"scale": problem.head_dim**-0.5, "config": config, "interpret": interpret}

    def blocks_of(a: Arrays) -> Blocks:
        return whole_rows(a["query"], a["key"], block_size=problem.block_size, is_causal=True)

    def choose(a: Arrays) -> jax.Array:
        sizes = TRITON if isinstance(config, MosaicConfig) else config
        static: dict[str, Any] = {"top_k": problem.top_k, "is_causal": True, "interpret": bool(interpret)}
        return route(a["query"], a["key"], blocks_of(a), config=sizes, **static)

    def attend(a: Arrays, indices: jax.Array) -> Results:
        return attend_forward((a["query"], a["key"], a["value"]), indices, blocks_of(a), **options)

    def differentiate(a: Arrays, indices: jax.Array) -> tuple[jax.Array, ...]:
        results = attend(a, indices)
        cotangents = a["d_output"], jnp.zeros_like(results[1])
        arrays = a["query"], a["key"], a["value"]
        return attend_backward(arrays, indices, blocks_of(a), results, cotangents, **options)

    def over_chunks(a: Arrays, indices: jax.Array, keep: Callable[..., jax.Array]) -> jax.Array:
        """Sums one number per chunk, so that XLA cannot drop the work as unused."""
        assert isinstance(config, TritonConfig)
        plan, attend_chunk = forward.attend_chunks((a["query"], a["key"], a["value"]), indices, blocks_of(a), **options)
        tile_size = config.for_rows(padded_head_dim(problem.head_dim), a["query"].dtype.itemsize).tile_size

        def add(chunk: Chunk, total: jax.Array) -> jax.Array:
            return total + keep(chunk, attend_chunk).astype(jnp.float32)

        return for_chunks(plan, indices, tile_size, add, jnp.float32(0))

    def schedule_only(a: Arrays, indices: jax.Array) -> jax.Array:
        return over_chunks(a, indices, lambda chunk, _: chunk.schedule.pair.sum() + chunk.schedule.block.sum())

    def without_merge(a: Arrays, indices: jax.Array) -> jax.Array:
        def keep(chunk: Chunk, attend_chunk: Callable[[Chunk], tuple[jax.Array, jax.Array]]) -> jax.Array:
            output, log_sum_exp = attend_chunk(chunk)
            return output[0, 0].astype(jnp.float32) + log_sum_exp[0]

        return over_chunks(a, indices, keep)

    stages = {} if is_mosaic else {"schedule": schedule_only, "schedule_attend": without_merge}
    return {
        "route": choose,
        **stages,
        "forward": attend,
        "forward_backward": differentiate,
        "whole_forward": lambda a: attend(a, choose(a)),
        "whole_forward_backward": lambda a: differentiate(a, choose(a)),
    }


def takes_choice(name: str) -> bool:
    """Whether a call of `make_calls` takes the choice after the arrays."""
    return name in ("schedule", "schedule_attend", "forward", "forward_backward")


def dense_calls() -> dict[str, Callable[..., Any]]:
    """cuDNN's dense causal attention on the same arrays."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    def differentiate(a: Arrays) -> tuple[jax.Array, ...]:
        return jax.vjp(attend, a["query"], a["key"], a["value"])[1](a["d_output"])

    return {
        "dense_forward": lambda a: attend(a["query"], a["key"], a["value"]),
        "dense_forward_backward": differentiate,
    }


@functools.partial(jax.jit, static_argnums=0)
def right_results(problem: Problem, arrays: Arrays) -> dict[str, Any]:
    """Results of "route", "forward" and "forward_backward", computed densely by XLA in float32.

    Holds logits `[batch, heads, queries, keys]`, so it is for sequences of a few thousand tokens.
    """
    query, key, value, d_output = (
        arrays[name].astype(jnp.float32) for name in ("query", "key", "value", "d_output")
    )  # each [batch, tokens, heads, head_dim]
    block = jnp.arange(problem.num_blocks)
    own = (jnp.arange(problem.sequence) // problem.block_size)[None, None, :, None]  # [1, 1, queries, 1]
    means = key.reshape(problem.batch, problem.num_blocks, problem.block_size, *key.shape[2:]).mean(2)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bqhd,bnhd->bhqn", query, means)  # n blocks
        scores = jnp.where(block == own, jnp.inf, jnp.where(block < own, scores, -jnp.inf))
        best, indices = lax.top_k(scores, problem.top_k)  # lower blocks first among equals
        indices = jnp.where(best == -jnp.inf, -1, indices)  # [batch, heads, queries, top_k]
        is_chosen = (indices[..., None] == block).any(-2)  # [batch, heads, queries, blocks]
        place = jnp.arange(problem.sequence)
        is_seen = jnp.repeat(is_chosen, problem.block_size, axis=-1) & (place <= place[:, None])

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * problem.head_dim**-0.5
            logits = jnp.where(is_seen, logits, -jnp.inf)
            log_sum_exp = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            output = jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(logits - log_sum_exp), value)
            return output, log_sum_exp[..., 0].swapaxes(1, 2)

        results, pull_back = jax.vjp(attend, query, key, value)
        gradients = pull_back((d_output, jnp.zeros_like(results[1])))
    return {"route": indices, "forward": results, "forward_backward": gradients}


def is_right(actual: Any, expected: Any) -> bool:
    """Whether results match those of `right_results`: choices exactly, numbers up to 16-bit rounding."""

    def agree(actual: jax.Array, expected: jax.Array) -> bool:
        if jnp.issubdtype(expected.dtype, jnp.integer):
            return bool((actual == expected).all())
        error = jnp.abs(actual.astype(jnp.float32) - expected).max()
        return bool(error <= _TOLERANCE * jnp.maximum(1, jnp.abs(expected).max()))  # False for NaN

    return jax.tree.all(jax.tree.map(agree, actual, expected))
