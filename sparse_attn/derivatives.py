"""Derivatives of attention over a given choice: the one place where every way of computing it meets JAX's autodiff.

A `Backend` computes attention fast, forward and backward, and says in plain JAX what it computes (`dense`). From these
`attend` has derivatives of every order and kind:

    grad            forward, then backward: what training takes
    jvp             forward; the tangent is that of `dense`
    grad of grad    forward and backward; their derivatives are those of `dense`

`dense` holds a table of queries x keys, so forward mode and second derivatives take memory quadratic in the sequence.

JAX's `custom_vjp` has no forward mode, and `custom_jvp` no backward pass of its own. Here `custom_jvp` gives the
tangent as one linear operation of the tangents of query, key and value, a primitive whose transpose is the backward
pass.
"""

import functools
from typing import Any, Protocol

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, batching, mlir

from sparse_attn.sharding import over_auto_axes, own_promotion, vary_alike

Arrays = tuple[jax.Array, jax.Array, jax.Array]
"""Query `[batch, queries, heads, head_dim]`, key and value `[batch, keys, kv_heads, head_dim]`."""
Results = tuple[jax.Array, jax.Array]
"""Output `[batch, queries, heads, head_dim]` and the log-sum-exp of the logits `[batch, queries, heads]`, float32."""
_ARRAY_AXES = ("b.h", "b.k", "b.k")
_RESULT_AXES = ("b.h", "b.h")


class Backend(Protocol):
    """A way to compute attention over a choice: a frozen, hashable value with its sizes as fields.

    `choice` is a pytree of arrays without gradients: which blocks, and who may see whom. Rows of the batch and
    key/value heads, with the query heads that read them, are independent of one another.
    """

    @property
    def has_effects(self) -> bool:
        """Whether it must run as it stands, as interpreted kernels do, which call back to Python in a fixed order."""

    def choice_axes(self, choice: Any) -> Any:
        """The axes of choice as words, see `sparse_attn.sharding`."""

    def forward(self, arrays: Arrays, choice: Any) -> Results:
        """Output and log-sum-exp."""

    def backward(self, arrays: Arrays, choice: Any, results: Results, cotangents: Results) -> Arrays:
        """Gradients of query, key and value, given those of the results."""

    def dense(self, arrays: Arrays, choice: Any) -> Results:
        """The same as `forward` in plain JAX, differentiable any number of times."""


def attend(backend: Backend, arrays: Arrays, choice: Any) -> Results:
    """Attention over a choice by a backend.

    `jax.checkpoint` policies can keep the results by the names "attention_output" and "attention_log_sum_exp"; the
    backward pass then does without another forward pass.
    """
    arrays, choice = vary_alike((arrays, choice))
    return _attend(backend, arrays, choice)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(backend: Backend, arrays: Arrays, choice: Any) -> Results:
    if backend.has_effects:
        return backend.forward(arrays, choice)
    axes = _ARRAY_AXES, backend.choice_axes(choice)
    return over_auto_axes(backend.forward, (arrays, choice), axes, _RESULT_AXES, group=_group(arrays))


def _group(arrays: Arrays) -> int:
    return arrays[0].shape[2] // arrays[1].shape[2]


def _dense(backend: Backend, choice: Any, results: Results, *arrays: jax.Array) -> Results:
    """`dense`, in the dtypes of results."""
    with own_promotion():
        output, log_sum_exp = backend.dense(arrays, choice)  # type: ignore[arg-type]
    return output.astype(results[0].dtype), log_sum_exp.astype(results[1].dtype)


@_attend.defjvp
def _attend_jvp(backend: Backend, primals: tuple, tangents: tuple) -> tuple[Results, Results]:
    arrays, choice = primals
    output, log_sum_exp = _attend(backend, arrays, choice)
    results = (
        checkpoint_name(output, "attention_output"),
        checkpoint_name(log_sum_exp, "attention_log_sum_exp"),
    )
    known, tree = jax.tree.flatten((arrays, choice, results))
    tangent = _tangent_primitive().bind(*known, *tangents[0], backend=backend, tree=tree, num_vmaps=0)
    return results, tuple(tangent)


def _tangent(*operands: jax.Array, backend: Backend, tree: jax.tree_util.PyTreeDef, num_vmaps: int) -> list[jax.Array]:
    """Tangents of the results: what forward mode runs. Operands: the leaves of (arrays, choice, results), tangents."""

    def tangent(*operands: jax.Array) -> list[jax.Array]:
        arrays, choice, results = tree.unflatten(operands[:-3])
        return list(jax.jvp(functools.partial(_dense, backend, choice, results), arrays, operands[-3:])[1])

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
    """The second derivative, by that of `dense`: the results count as functions of the arrays."""
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    arrays, rest, linear = primals[:3], primals[3:-3], primals[-3:]

    def tangent(*varied: jax.Array) -> list[jax.Array]:
        return _tangent(*varied[:3], *rest, *varied[3:], **options)

    return jax.jvp(tangent, (*arrays, *linear), (*tangents[:3], *tangents[-3:]))


def _transpose_tangent(
    cotangents: list, *operands: Any, backend: Backend, tree: jax.tree_util.PyTreeDef, num_vmaps: int
) -> list:
    """The backward pass."""

    def pull_back(known: list[jax.Array], cotangents: tuple) -> Arrays:
        return _pull_back(backend, *tree.unflatten(known), vary_alike(cotangents, known))

    for _ in range(num_vmaps):
        pull_back = jax.vmap(pull_back)
    gradients = pull_back(list(operands[:-3]), tuple(map(ad.instantiate_zeros, cotangents)))
    return [None] * (len(operands) - 3) + [
        gradient if ad.is_undefined_primal(operand) else None
        for gradient, operand in zip(gradients, operands[-3:], strict=True)
    ]


def _batch_tangent(operands: tuple, axes: tuple, *, num_vmaps: int, **options: Any) -> tuple[list, list[int]]:
    (size,) = {operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None}
    operands = tuple(batching.bdim_at_front(*each, size) for each in zip(operands, axes, strict=True))
    return _tangent_primitive().bind(*operands, num_vmaps=num_vmaps + 1, **options), [0, 0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pull_back(backend: Backend, arrays: Arrays, choice: Any, results: Results, cotangents: Results) -> Arrays:
    if backend.has_effects:
        return backend.backward(arrays, choice, results, cotangents)
    operands = arrays, choice, results, cotangents
    axes = _ARRAY_AXES, backend.choice_axes(choice), _RESULT_AXES, _RESULT_AXES
    return over_auto_axes(backend.backward, operands, axes, _ARRAY_AXES, group=_group(arrays))


@_pull_back.defjvp
def _pull_back_jvp(backend: Backend, primals: tuple, tangents: tuple) -> tuple[Arrays, Arrays]:
    arrays, choice, results, cotangents = primals

    def gradients(arrays: Arrays, cotangents: Results) -> Arrays:
        return jax.vjp(functools.partial(_dense, backend, choice, results), *arrays)[1](cotangents)

    _, tangent = jax.jvp(gradients, (arrays, cotangents), (tangents[0], tangents[3]))
    return _pull_back(backend, *primals), tangent
