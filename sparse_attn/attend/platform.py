"""Backends by platform: which one runs is settled when a program is compiled, for the devices it is compiled for.

A program may be traced on a CPU and compiled for a TPU, exported for both, or run on the CPU of a host that has a GPU.
So the choice among backends is an operation of its own, `attention_by_platform`: tracing it costs next to nothing, and
its lowering rule for a platform traces the first backend that runs there and can do the call. What is not compiled for
is neither traced nor imported.

Some backends are taken on proven kinds of devices alone. The kinds are those of all devices that the program is
compiled for, on other hosts too, so every host of a mesh settles alike.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from pallas_kernels.blocks import Arrays, Blocks, Results
from sparse_attn.attend.choice import Choice
from sparse_attn.attend.derivatives import Backend

_PLATFORMS = ("cpu", "tpu", "cuda", "rocm")


@dataclasses.dataclass(frozen=True)
class ByPlatform:
    """A backend that is the first of several which runs on the platform at hand and does not refuse the call.

    Attributes:
      backends: the several.
      by_kind: (kind of device, backend): what goes before them where all devices are of that kind.
      proven: the kinds of devices on which `backends` need no warning; None: all.

    Raises:
      NotImplementedError: where the program is compiled, if there is none; with the reasons.
    """

    backends: tuple[Backend, ...]
    by_kind: tuple[tuple[str, Backend], ...] = ()
    proven: frozenset[str] | None = None

    @property
    def platforms(self) -> None:
        """Wherever one of the backends does."""

    @property
    def rounds_output(self) -> bool:
        return all(backend.rounds_output for backend in self.backends)

    @property
    def has_effects(self) -> bool:
        return False

    def refuses(self, arrays: Arrays, choice: Choice) -> str | None:
        return self._all_refuse(lambda backend: backend.refuses(arrays, choice))

    def refuses_route(self, query: jax.Array, top_k: int) -> str | None:
        return self._all_refuse(lambda backend: backend.refuses_route(query, top_k))

    def _all_refuse(self, refuses: Callable[[Backend], str | None]) -> str | None:
        """The reasons if every backend has one. The last is asked first: what does all asks for no import."""
        reasons = []
        for backend in reversed(self.backends):
            reason = refuses(backend)
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(reversed(reasons))

    def route(self, query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool) -> jax.Array:
        batch, num_queries, num_heads, _ = query.shape
        like = query[..., 0].swapaxes(1, 2)[..., None].astype(jnp.int32)
        like = jnp.broadcast_to(like, (batch, num_heads, num_queries, top_k))
        (indices,) = _call(self, "route", (query, key, blocks), (top_k, is_causal), (like,))
        return indices

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        query, _, value = arrays
        exact = jnp.promote_types(query.dtype, jnp.float32)
        output = query[..., :1].astype(query.dtype if self.rounds_output else exact)
        output = jnp.broadcast_to(output, (*query.shape[:3], value.shape[3]))
        output, log_sum_exp = _call(self, "forward", (arrays, choice), (scale,), (output, query[..., 0].astype(exact)))
        return output, log_sum_exp

    def backward(self, arrays: Arrays, choice: Choice, results: Results, cotangents: Results, scale: float) -> Arrays:
        query, key, value = _call(self, "backward", (arrays, choice, results, cotangents), (scale,), arrays)
        return query, key, value

    def refuses_decode(self, arrays: Arrays, indices: jax.Array) -> str | None:
        return self._all_refuse(lambda backend: backend.refuses_decode(arrays, indices))

    def decode(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        query, _, value = arrays
        dtype = query.dtype if self.rounds_output else jnp.promote_types(query.dtype, jnp.float32)
        like = jnp.broadcast_to(query[..., :1].astype(dtype), (*query.shape[:3], value.shape[4]))
        (output,) = _call(self, "decode", (arrays, indices, length, num_new), (scale,), (like,))
        return output


def _call(backend: ByPlatform, method: str, operands: tuple, options: tuple, like: tuple) -> tuple[jax.Array, ...]:
    """backend.method(*operands, *options), whose results have the types of `like`."""
    leaves, tree = jax.tree.flatten(operands)
    types = tuple(map(jax.typeof, like))
    return tuple(_primitive().bind(*leaves, backend=backend, method=method, tree=tree, options=options, types=types))


def _lower(platform: str, context: mlir.LoweringRuleContext, *leaves: Any, **options: Any) -> Any:
    """The lowering rule for one platform."""
    run = functools.partial(_run, platform, _device_kinds(platform, context))
    return mlir.lower_fun(run, multiple_results=True)(context, *leaves, **options)


def _device_kinds(platform: str, context: mlir.LoweringRuleContext) -> frozenset[str]:
    """The kinds of the devices that a program is lowered for.

    Lowering knows its devices or, with Explicit axes, what they are like. Where it does not, as for a call outside
    `jax.jit`, they are all devices of that platform, on every host; there may be none, as where a program is exported.
    """
    axes: Any = context.module_context.axis_context
    if hasattr(axes, "mesh"):  # axes are manual, as in `jax.shard_map`
        is_abstract = isinstance(axes.mesh, jax.sharding.AbstractMesh)
        devices = [axes.mesh.abstract_device] if is_abstract else list(axes.mesh.devices.flat)
    else:
        devices = list(axes.device_assignment or ())
    name = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    kinds = frozenset(device.device_kind for device in devices if device is not None and device.platform == name)
    if kinds:
        return kinds
    try:
        return frozenset(device.device_kind for device in jax.devices(platform))
    except RuntimeError:  # this process has none
        return frozenset()


def _run(
    platform: str,
    kinds: frozenset[str],
    *leaves: jax.Array,
    backend: ByPlatform,
    method: str,
    tree: jax.tree_util.PyTreeDef,
    options: tuple,
    types: tuple,
) -> list[jax.Array]:
    """The operation on devices of those kinds, all of one platform."""
    operands = tree.unflatten(leaves)
    proven = [candidate for kind, candidate in backend.by_kind if kinds == {kind}]
    reasons = []
    for candidate in (*proven, *backend.backends):
        if candidate.platforms is not None and platform not in candidate.platforms:
            continue
        if method == "route":
            reason = candidate.refuses_route(operands[0], options[0])
        elif method == "decode":
            reason = candidate.refuses_decode(*operands[:2])
        else:
            reason = candidate.refuses(*operands[:2])
        if reason is None:
            if backend.proven is not None and not (kinds and kinds <= backend.proven):
                _warn_unproven(type(candidate).__name__, platform, ", ".join(sorted(kinds)))
            results = jax.tree.leaves(getattr(candidate, method)(*operands, *options))
            return [result.astype(kind.dtype) for result, kind in zip(results, types, strict=True)]
        reasons.append(reason)
    names = ", ".join(type(candidate).__name__ for candidate in backend.backends)
    why = "; ".join(reasons) or f"{names} cannot run on {platform}"
    raise NotImplementedError(f"{why}; implementation='xla' does every call on every platform")


@functools.cache
def _warn_unproven(name: str, platform: str, kinds: str) -> None:
    """Warns, once in a process."""
    warnings.warn(
        f"{name} have not been shown to be right on {platform}{kinds and f' ({kinds})'}: there, "
        "`python -m experiments verify` says whether they are; implementation='xla' needs no proof",
        stacklevel=2,
    )


@functools.cache
def _primitive() -> Any:
    """The operation, with a lowering rule for each platform, made when first needed (as in `derivatives`)."""
    from jax.extend.core import Primitive

    primitive = Primitive("attention_by_platform")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *_, types, **__: list(types))
    for platform in (*_PLATFORMS, None):  # None: any other
        rule = functools.partial(_lower, platform or "this platform")
        mlir.register_lowering(primitive, rule, platform=platform)
    apply = jax.jit(primitive.bind, static_argnames=("backend", "method", "tree", "options", "types"))
    primitive.def_impl(apply)
    return primitive
