"""Merging of attention over disjoint sets of keys."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Attention over some of the keys, not yet divided: with logits x, m any number near max(x),

    l = sum(exp(x - m)) and a = sum(exp(x - m) v). Whatever can be said as "keys with a logit and a value" is one.

    Attributes:
      maximum: m, float32 `[batch, queries, heads]`; -inf for a query without keys.
      total: l, shaped like it.
      accumulator: a, float32 `[batch, queries, heads, head_dim]`.
    """

    maximum: jax.Array
    total: jax.Array
    accumulator: jax.Array

    def output(self) -> jax.Array:
        """a / l, zero for a query without keys (S9)."""
        total = self.total[..., None]
        return jnp.where(total > 0, self.accumulator / jnp.where(total > 0, total, 1), 0)

    def log_sum_exp(self) -> jax.Array:
        """m + log(l), natural logarithm, -inf for a query without keys."""
        has_keys = self.total > 0
        return jnp.where(has_keys, self.maximum + jnp.log(jnp.where(has_keys, self.total, 1)), -jnp.inf)


def merge(*partials: Partial) -> Partial:
    """Attention over the union of disjoint sets of keys: all three numbers rescaled to the common maximum and added."""
    maximum = jax.lax.stop_gradient(functools.reduce(jnp.maximum, (partial.maximum for partial in partials)))
    reference = jnp.where(jnp.isneginf(maximum), 0, maximum)
    total, accumulator = jnp.zeros_like(maximum), jnp.zeros_like(partials[0].accumulator)
    for partial in partials:
        factor = jnp.exp(partial.maximum - reference)
        total += factor * partial.total
        accumulator += factor[..., None] * partial.accumulator
    return Partial(maximum, total, accumulator)


def as_partial(output: jax.Array, log_sum_exp: jax.Array) -> Partial:
    """Finished attention as a partial result: m the log-sum-exp, l = 1, a the output."""
    total = jnp.where(jnp.isneginf(log_sum_exp), 0.0, 1.0).astype(log_sum_exp.dtype)
    return Partial(log_sum_exp, total, output.astype(log_sum_exp.dtype))


def merge_partials(*partials: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Joins softmax attention over disjoint sets of keys into attention over their union.

    With o_i = softmax(x_i) v_i over set i and L_i = log(sum(exp(x_i))), the union gives
    L = log(sum_i exp(L_i)) and o = sum_i exp(L_i - L) o_i. A set that is empty for a query has L_i = -inf and counts
    for nothing; where all are empty the output is zero and L = -inf. Source: FlashAttention-2 (arXiv 2307.08691),
    section 3.1.

    Args:
      partials: pairs of an output `[..., head_dim]` and its log-sum-exp `[...]` (natural logarithm), all of the same
        shapes: what `block_sparse_attention(..., return_residual=True)` gives.

    Returns:
      The merged output and its log-sum-exp, of the same shapes.

    Raises:
      ValueError: there is no pair, or shapes differ.
    """
    shapes = {(output.shape, (*log_sum_exp.shape, output.shape[-1])) for output, log_sum_exp in partials}
    if len(shapes) != 1 or len(set(shapes.pop())) != 1:
        given = [(output.shape, log_sum_exp.shape) for output, log_sum_exp in partials]
        raise ValueError(f"partials must be pairs of [..., head_dim] and [...] of the same shapes, got {given}")
    outputs, log_sum_exps = (jnp.stack(arrays) for arrays in zip(*partials, strict=True))
    return merge_stacked(outputs, log_sum_exps, axis=0)


def merge_stacked(outputs: jax.Array, log_sum_exp: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """`merge_partials` of parts along an axis.

    Args:
      outputs: `[..., parts, ..., head_dim]`, attention over each part, with the parts along `axis`.
      log_sum_exp: `[..., parts, ...]`, natural logarithm, shaped like outputs without the last axis.
      axis: the axis of the parts, not the last of outputs; counted from the front.

    Returns:
      The merged output and its log-sum-exp: the shapes given, without the axis of the parts.
    """
    outputs = jnp.moveaxis(outputs, axis, -2)  # [..., parts, head_dim]
    log_sum_exp = jnp.moveaxis(log_sum_exp, axis, -1)  # [..., parts]
    largest = jax.lax.stop_gradient(log_sum_exp.max(-1, keepdims=True))
    weight = jnp.exp(log_sum_exp - jnp.where(jnp.isneginf(largest), 0, largest))
    total = weight.sum(-1, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    output = jnp.einsum("...p,...pd->...d", weight / total, outputs.astype(weight.dtype), precision="highest")
    merged = jnp.where(is_empty, -jnp.inf, jnp.log(total) + largest)
    return output.astype(outputs.dtype), merged[..., 0]
