"""Derivatives of attention over a given choice: the one place where every way of computing it meets JAX's autodiff.

A `Backend` computes attention fast, forward and backward; `_dense` says in plain JAX what that is. From these `attend`
has derivatives of every order and kind:

    grad            forward, then backward: what training takes
    jvp             forward; the tangent is that of `_dense`
    grad of grad    forward and backward; their derivatives are those of `_dense`

`_dense` holds a table of queries x keys, so forward mode and second derivatives take memory quadratic in the sequence.

JAX's `custom_vjp` has no forward mode, and `custom_jvp` no backward pass of its own. Here `custom_jvp` gives the
tangent as one linear operation of the tangents of query, key and value, a primitive whose transpose is the backward
pass.
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, batching, mlir

from pallas_kernels.blocks import Arrays, Blocks, Results
from sparse_attn import reference
from sparse_attn.attend.choice import Choice
from sparse_attn.sharding import over_auto_axes, own_promotion, vary_alike

_ARRAY_AXES = ("b.h", "b.k", "b.k")
_RESULT_AXES = ("b.h", "b.h")


@runtime_checkable
class Backend(Protocol):
    """A way to compute: a frozen, hashable value with its sizes as fields.

    Rows of the batch and key/value heads, with the query heads that read them, are independent of one another.

    Attributes:
      platforms: where it runs, as JAX names platforms; None: anywhere.
      rounds_output: whether outputs leave it in the query's dtype; else in float32 (float64 for float64).
      has_effects: whether it must run as it stands, as interpreted kernels do, which call back to Python in a fixed
        order.
    """

    @property
    def platforms(self) -> tuple[str, ...] | None: ...

    @property
    def rounds_output(self) -> bool: ...

    @property
    def has_effects(self) -> bool: ...

    def refuses(self, arrays: Arrays, choice: Choice) -> str | None:
        """Why it cannot attend, forward or backward, in words; None if it can. Shapes and dtypes alone decide."""

    def refuses_route(self, query: jax.Array, top_k: int) -> str | None:
        """Why it cannot route, in words; None if it can."""

    def route(self, query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool) -> jax.Array:
        """As `reference.route`."""

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        """Output and log-sum-exp."""

    def backward(self, arrays: Arrays, choice: Choice, results: Results, cotangents: Results, scale: float) -> Arrays:
        """Gradients of query, key and value, given those of the results.

        The results may be over more keys than the choice: the gradients are then this choice's part of the whole.
        """

    def refuses_decode(self, arrays: Arrays, indices: jax.Array) -> str | None:
        """Why it cannot `decode`, in words; None if it can."""

    def decode(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        """Attention of new tokens to the chosen blocks of a cache; the arrays are those of `decode` below."""


def output_gradient(arrays: Arrays, results: Results, cotangents: Results) -> tuple[jax.Array, jax.Array]:
    """What every backward pass begins with: dO in query's dtype, and delta = sum(dO O) - dL `[batch, queries, heads]`.

    dL is the gradient of the log-sum-exp. Source: FlashAttention-2 (arXiv 2307.08691), section 2. O comes in float32
    where it can: delta from a rounded O makes dQ and dK of 16-bit inputs two to three times as wrong where logits are
    large.
    """
    (output, _), (d_output, d_log_sum_exp) = results, cotangents
    d_output = d_output.astype(arrays[0].dtype)
    return d_output, (d_output.astype(output.dtype) * output).sum(-1) - d_log_sum_exp


def attend(backend: Backend, arrays: Arrays, choice: Choice, scale: float) -> Results:
    """Attention over a choice by a backend, which must not refuse the call.

    `jax.checkpoint` policies can keep the results by the names "attention_output" and "attention_log_sum_exp"; the
    backward pass then does without another forward pass.

    Returns:
      The output, in query's dtype or float32 (`Backend.rounds_output`), and the log-sum-exp.
    """
    arrays, choice = vary_alike((arrays, choice))
    return _attend(backend, scale, arrays, choice)


def route(
    backend: Backend, query: jax.Array, key: jax.Array, blocks: Blocks, *, top_k: int, is_causal: bool
) -> jax.Array:
    """`reference.route` by a backend, without a gradient.

    `jax.checkpoint` policies can keep the choice by the name "block_selection".
    """
    operands = vary_alike(jax.lax.stop_gradient((query, key, blocks)))
    call = functools.partial(backend.route, top_k=top_k, is_causal=is_causal)
    if backend.has_effects:
        indices = call(*operands)
    else:
        axes = ("b.h", "b.k", blocks.axes())
        indices = over_auto_axes(call, operands, axes, "bh", group=query.shape[2] // key.shape[2])
    return checkpoint_name(indices, "block_selection")


def decode(
    backend: Backend, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
) -> jax.Array:
    """Attention of new tokens, few or many, to the chosen blocks of a cache. Not differentiable.

    Args:
      backend: which must not refuse the call.
      arrays: query `[batch, queries, heads, head_dim]`, key `[batch, kv_heads, blocks, block_size, head_dim]` and value
        `[batch, kv_heads, blocks, block_size, value_head_dim]`, of one dtype.
      indices: int32 `[batch, heads, queries, top_k]`, blocks of keys that the query sees, none twice in a list; -1 for
        none.
      length: int32 `[batch]`, tokens of a row, the queries' own included. What lies behind them may be anything.
      num_new: int32 `[batch]`: query t stands at position length - num_new + t and sees the keys up to there; from
        num_new on queries are padding and give zeros.
      scale: factor of the logits.

    Returns:
      Array `[batch, queries, heads, value_head_dim]`, of query's dtype or float32 (`Backend.rounds_output`).
    """
    operands = vary_alike((arrays, indices, length, num_new))
    call = functools.partial(backend.decode, scale=scale)
    if backend.has_effects:
        return call(*operands)
    axes = (("b.h", "bk", "bk"), "bh", "b", "b")
    return over_auto_axes(call, operands, axes, "b.h", group=arrays[0].shape[2] // arrays[1].shape[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(backend: Backend, scale: float, arrays: Arrays, choice: Choice) -> Results:
    forward = functools.partial(backend.forward, scale=scale)
    if backend.has_effects:
        return forward(arrays, choice)
    axes = _ARRAY_AXES, choice.axes()
    return over_auto_axes(forward, (arrays, choice), axes, _RESULT_AXES, group=_group(arrays))


def _group(arrays: Arrays) -> int:
    return arrays[0].shape[2] // arrays[1].shape[2]


def _dense(
    scale: float, choice: Choice, results: Results, query: jax.Array, key: jax.Array, value: jax.Array
) -> Results:
    """What `attend` computes, in plain JAX and in the dtypes of results; differentiable any number of times."""
    with own_promotion():
        output, log_sum_exp = reference.masked_attention(
            query, key, value, choice.mask(), scale=scale, key_log_weight=choice.key_log_weight
        )
    return output.astype(results[0].dtype), log_sum_exp.astype(results[1].dtype)


@_attend.defjvp
def _attend_jvp(backend: Backend, scale: float, primals: tuple, tangents: tuple) -> tuple[Results, Results]:
    arrays, choice = primals
    output, log_sum_exp = _attend(backend, scale, arrays, choice)
    results = (
        checkpoint_name(output, "attention_output"),
        checkpoint_name(log_sum_exp, "attention_log_sum_exp"),
    )
    known, tree = jax.tree.flatten((arrays, choice, results))
    tangent = _tangent_primitive().bind(*known, *tangents[0], backend=backend, scale=scale, tree=tree, num_vmaps=0)
    return results, tuple(tangent)


def _tangent(
    *operands: jax.Array, backend: Backend, scale: float, tree: jax.tree_util.PyTreeDef, num_vmaps: int
) -> list[jax.Array]:
    """Tangents of the results: what forward mode runs. Operands: the leaves of (arrays, choice, results), tangents."""
    del backend

    def tangent(*operands: jax.Array) -> list[jax.Array]:
        arrays, choice, results = tree.unflatten(operands[:-3])
        return list(jax.jvp(functools.partial(_dense, scale, choice, results), arrays, operands[-3:])[1])

    for _ in range(num_vmaps):
        tangent = jax.vmap(tangent)
    return tangent(*operands)


@functools.cache
def _tangent_primitive() -> Any:
    """The linear operation, with its rules, made when first needed: `jax.extend.core` loads a part of Pallas."""
    from jax.extend.core import Primitive

    primitive = Primitive("attention_tangent")
    primitive.multiple_results = True
    primitive.def_impl(_tangent)
    primitive.def_abstract_eval(_abstract_tangent)
    mlir.register_lowering(primitive, mlir.lower_fun(_tangent, multiple_results=True))
    ad.primitive_jvps[primitive] = _differentiate_tangent
    ad.primitive_transposes[primitive] = _transpose_tangent
    batching.primitive_batchers[primitive] = _batch_tangent
    return primitive


def _abstract_tangent(*operands: Any, tree: jax.tree_util.PyTreeDef, **_: Any) -> list:
    """A tangent has the type of its primal."""
    return list(tree.unflatten(operands[:-3])[2])


def _differentiate_tangent(primals: tuple, tangents: tuple, **options: Any) -> tuple[list, list]:
    """The second derivative, by that of `_dense`: the results count as functions of the arrays."""
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    arrays, rest, linear = primals[:3], primals[3:-3], primals[-3:]

    def tangent(*varied: jax.Array) -> list[jax.Array]:
        return _tangent(*varied[:3], *rest, *varied[3:], **options)

    return jax.jvp(tangent, (*arrays, *linear), (*tangents[:3], *tangents[-3:]))


def _transpose_tangent(
    cotangents: list, *operands: Any, backend: Backend, scale: float, tree: jax.tree_util.PyTreeDef, num_vmaps: int
) -> list:
    """The backward pass."""

    def pull(known: list[jax.Array], cotangents: tuple) -> Arrays:
        return pull_back(backend, scale, *tree.unflatten(known), vary_alike(cotangents, known))

    for _ in range(num_vmaps):
        pull = jax.vmap(pull)
    gradients = pull(list(operands[:-3]), tuple(map(ad.instantiate_zeros, cotangents)))
    return [None] * (len(operands) - 3) + [
        gradient if ad.is_undefined_primal(operand) else None
        for gradient, operand in zip(gradients, operands[-3:], strict=True)
    ]


def _batch_tangent(operands: tuple, axes: tuple, *, num_vmaps: int, **options: Any) -> tuple[list, list[int]]:
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    operands = tuple(batching.bdim_at_front(*each, size) for each in zip(operands, axes, strict=True))
    return _tangent_primitive().bind(*operands, num_vmaps=num_vmaps + 1, **options), [0, 0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def pull_back(
    backend: Backend, scale: float, arrays: Arrays, choice: Choice, results: Results, cotangents: Results
) -> Arrays:
    """Gradients of the arrays, given the results and theirs: the backward pass, itself differentiable.

    The results may be over more keys than the choice, see `Backend.backward`; then there is no derivative of this.
    """

    def backward(arrays: Arrays, choice: Choice, results: Results, cotangents: Results) -> Arrays:
        return backend.backward(arrays, choice, results, cotangents, scale)

    operands = arrays, choice, results, cotangents
    if backend.has_effects:
        return backward(*operands)
    axes = _ARRAY_AXES, choice.axes(), _RESULT_AXES, _RESULT_AXES
    return over_auto_axes(backward, operands, axes, _ARRAY_AXES, group=_group(arrays))


@pull_back.defjvp
def _pull_back_jvp(backend: Backend, scale: float, primals: tuple, tangents: tuple) -> tuple[Arrays, Arrays]:
    arrays, choice, results, cotangents = primals

    def gradients(arrays: Arrays, cotangents: Results) -> Arrays:
        return jax.vjp(functools.partial(_dense, scale, choice, results), *arrays)[1](cotangents)

    _, tangent = jax.jvp(gradients, (arrays, cotangents), (tangents[0], tangents[3]))
    return pull_back(backend, scale, *primals), tangent
