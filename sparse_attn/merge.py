"""Merging of attention over disjoint sets of keys."""

import jax
import jax.numpy as jnp


def merge_partials(outputs: jax.Array, log_sum_exp: jax.Array, *, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """Joins softmax attention over disjoint sets of keys into attention over their union.

    With o_i = softmax(x_i) v_i over set i and L_i = log(sum(exp(x_i))), the union gives
    L = log(sum_i exp(L_i)) and o = sum_i exp(L_i - L) o_i. A set that is empty for a query has L_i = -inf and counts
    for nothing; where all are empty the output is zero and L = -inf. Source: FlashAttention-2 (arXiv 2307.08691),
    section 3.1.

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
