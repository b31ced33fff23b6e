"""The backends, and the table of their names.

    name            backend                                                      runs on
    "reference"     `Reference`: dense masks, in plain JAX                       everything
    "xla"           `Xla`: the sparse path in plain JAX, sized by platform       everything
    "pallas"        `TpuKernels`; `TritonKernels`, else `MosaicKernels`          TPU; NVIDIA GPU
    "mosaic"        `MosaicKernels`                                              Hopper GPU
    None            what `VERIFIED` names for the kind of device, else `Xla`     everything

Which JAX has which kernels, all others alike:

    jax             Triton                      Mosaic GPU
    0.10            yes                         no
    0.11, 0.12      yes, its end is announced   yes
    newer           once it is gone, no         yes; what Triton did for it is done in plain JAX

Defaults follow evidence: None takes kernels only where a committed run of `python -m experiments verify` found them
right. Who names a kernel gets it, elsewhere with a warning.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Arrays, Blocks, Results
from pallas_kernels.config import MOSAIC, PER_QUERY, TRITON, MosaicConfig, PerQueryConfig, TritonConfig
from pallas_kernels.few_rows import num_rows
from sparse_attn import reference
from sparse_attn.attend import cached, per_query, per_tile, route
from sparse_attn.attend.choice import Choice, PerQuery, PerTile
from sparse_attn.attend.derivatives import Backend, output_gradient
from sparse_attn.attend.platform import ByPlatform

if TYPE_CHECKING:
    from pallas_kernels.tpu.routing import RoutingConfig

Kernels = Literal["pallas", "mosaic"]
Name = Literal["reference", "xla", Kernels]
Implementation = Name | Backend

# The implementation that None takes on a kind of device, `jax.Device.device_kind`. An entry needs the file that
# `python -m experiments verify` wrote on such a device, experiments/results/KIND/verify.json, with spaces in KIND as
# underscores. Empty: no kernel has run on its chip yet.
VERIFIED: dict[str, Kernels] = {}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Dense masks: `sparse_attn.reference`, with memory quadratic in the sequence."""

    platforms: tuple[str, ...] | None = None
    rounds_output = False
    has_effects = False

    def refuses(self, arrays: Arrays, choice: Choice) -> None:
        """It does every call."""

    def refuses_route(self, query: jax.Array, top_k: int) -> None:
        """It does every call."""

    def route(self, query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool) -> jax.Array:
        return reference.route(query, key, blocks, top_k=top_k, is_causal=is_causal)

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        weight = choice.key_log_weight
        return reference.masked_attention(*arrays, choice.mask(), scale=scale, key_log_weight=weight)

    def backward(self, arrays: Arrays, choice: Choice, results: Results, cotangents: Results, scale: float) -> Arrays:
        """Autodiff of `forward`. Where the results are over more keys, these have the share exp(own - lse) of them."""
        forward = functools.partial(self.forward, choice=choice, scale=scale)
        (own_output, own_log_sum_exp), pull_back = jax.vjp(forward, arrays)
        d_output, delta = output_gradient(arrays, results, cotangents)
        is_empty = jnp.isneginf(own_log_sum_exp)
        share = jnp.where(is_empty, 0, jnp.exp(own_log_sum_exp - jnp.where(is_empty, 0, results[1])))
        d_output = d_output.astype(own_output.dtype)
        d_log_sum_exp = share * ((d_output * own_output).sum(-1) - delta)
        return pull_back((share[..., None] * d_output, d_log_sum_exp))[0]

    def refuses_decode(self, arrays: Arrays, indices: jax.Array) -> None:
        """It does every call."""

    def decode(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        arrays, choice = cached.in_rows(arrays, indices, length, num_new)
        return self.forward(arrays, choice, scale)[0]


@dataclasses.dataclass(frozen=True)
class Xla:
    """The sparse path in plain JAX. Its sizes bound the steps of the loops.

    Attributes:
      route_sizes: of the router.
      per_query_sizes: of attention to choices made by every query.
      per_tile_sizes: of attention to choices made per tile.
      cached_rows: queries times heads of a group up to which attention to a cache gathers each query's blocks. More of
        them share blocks enough to be sorted by block.
      platforms: as in `Backend`.
    """

    route_sizes: route.Sizes = dataclasses.field(default_factory=route.Sizes)
    per_query_sizes: per_query.Sizes = dataclasses.field(default_factory=per_query.Sizes)
    per_tile_sizes: per_tile.Sizes = dataclasses.field(default_factory=per_tile.Sizes)
    cached_rows: int = 16
    platforms: tuple[str, ...] | None = None
    rounds_output = False
    has_effects = False

    def refuses(self, arrays: Arrays, choice: Choice) -> None:
        """It does every call."""

    def refuses_route(self, query: jax.Array, top_k: int) -> None:
        """It does every call."""

    def route(self, query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool) -> jax.Array:
        return route.route(query, key, blocks, top_k, is_causal, self.route_sizes)

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        if isinstance(choice, PerQuery):
            return per_query.forward(arrays, choice, scale, self.per_query_sizes)
        return per_tile.forward(arrays, choice, scale, self.per_tile_sizes)

    def backward(self, arrays: Arrays, choice: Choice, results: Results, cotangents: Results, scale: float) -> Arrays:
        if isinstance(choice, PerQuery):
            return per_query.backward(arrays, choice, results, cotangents, scale, self.per_query_sizes)
        return per_tile.backward(arrays, choice, results, cotangents, scale, self.per_tile_sizes)

    def refuses_decode(self, arrays: Arrays, indices: jax.Array) -> None:
        """It does every call."""

    def decode(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        if num_rows(arrays) <= self.cached_rows:
            return cached.attend(arrays, indices, length, num_new, scale)
        arrays, choice = cached.in_rows(arrays, indices, length, num_new)
        return self.forward(arrays, choice, scale)[0]


# On a CPU a step should stay near the cache. Elsewhere it should fill the machine and steps be few, for each costs
# launches and perhaps a word with the host: a call may take this memory beside its inputs and outputs.
STEP_BYTES = 3 * 2**30
_LARGE = 2**26
XLA = ByPlatform(
    (
        Xla(platforms=("cpu",)),
        Xla(
            route.Sizes(step_bytes=STEP_BYTES),
            per_query.Sizes(tile_sizes=(128, 64, 32, 16, 8), step_bytes=STEP_BYTES),
            per_tile.Sizes(logits_per_step=_LARGE, elements_per_step=_LARGE),
            cached_rows=128,
        ),
    )
)


_FEW_ROWS = 128  # queries times heads of a group that go to the decode kernels; more, to those for whole rows


class _Kernels:
    """What the kernels for choices made by every query share.

    Outputs leave the kernels in the query's dtype, and the backward pass takes delta = sum(dO O) from these: for 16-bit
    inputs with large logits dQ and dK are two to three times as wrong as with a float32 output, which would double what
    the kernels write.
    """

    config: Any
    interpret: Any
    rounds_output = True

    @property
    def has_effects(self) -> bool:
        return bool(self.interpret)

    def refuses(self, arrays: Arrays, choice: Choice) -> str | None:
        raise NotImplementedError

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        raise NotImplementedError

    def refuses_decode(self, arrays: Arrays, indices: jax.Array) -> str | None:
        if num_rows(arrays) <= _FEW_ROWS:
            return self._refuses_few(arrays, indices.shape[3])
        length = jax.ShapeDtypeStruct(arrays[0].shape[:1], jnp.int32)
        return self.refuses(*jax.eval_shape(cached.in_rows, arrays, indices, length, length))

    def decode(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        """A few tokens by the decode kernel, a chunk by the kernels for whole rows."""
        if num_rows(arrays) <= _FEW_ROWS:
            return self._decode_few(arrays, indices, length, num_new, scale)
        arrays, choice = cached.in_rows(arrays, indices, length, num_new)
        return self.forward(arrays, choice, scale)[0]

    def _refuses_few(self, arrays: Arrays, top_k: int) -> str | None:
        raise NotImplementedError

    def _decode_few(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        raise NotImplementedError

    def _per_query(self, attend: Callable[..., Any], arrays: Arrays, choice: Choice, *rest: Any) -> Any:
        """A pass of the kernels; rest is what follows the choice, the scale last."""
        assert isinstance(choice, PerQuery)
        indices, (*results, scale) = choice.blocks.reachable(choice.indices), rest
        options = {"scale": scale, "config": self.config, "interpret": self.interpret}
        return attend(arrays, indices, choice.blocks, *results, **options)


@dataclasses.dataclass(frozen=True)
class TpuKernels(_Kernels):
    """The Pallas kernels for TPUs. They have run on no TPU yet.

    Attributes:
      config: sizes of the kernels for choices made by every query.
      routing: sizes of the router; None for its own.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.
    """

    config: PerQueryConfig = PER_QUERY
    routing: "RoutingConfig | None" = None
    interpret: Any = False

    @property
    def platforms(self) -> tuple[str, ...] | None:
        return None if self.interpret else ("tpu",)

    def refuses(self, arrays: Arrays, choice: Choice) -> str | None:
        from pallas_kernels.tpu import limits
        from pallas_kernels.tpu.per_tile import operands

        if arrays[2].shape != arrays[1].shape:
            return f"the TPU kernels take values of key's head_dim {arrays[1].shape[3]}, got {arrays[2].shape[3]}"
        if isinstance(choice, PerQuery):
            return limits.refuses_per_query(*arrays[:2], choice.indices.shape[3], choice.blocks, self.config)
        if choice.key_log_weight is not None:
            return "the TPU kernels count every key once, got key_log_weight"
        return operands.refuses(arrays[0], choice.query_block_size, choice.blocks.block_size)

    def refuses_route(self, query: jax.Array, top_k: int) -> str | None:
        from pallas_kernels.tpu import routing

        return routing.refuses(query)

    def route(self, query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool) -> jax.Array:
        from pallas_kernels.tpu import routing

        options = {} if self.routing is None else {"config": self.routing}
        return routing.route(query, key, blocks, top_k=top_k, is_causal=is_causal, interpret=self.interpret, **options)

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        from pallas_kernels.tpu.per_query.forward import attend_forward
        from pallas_kernels.tpu.per_tile.forward import attend_tiles_forward

        if isinstance(choice, PerQuery):
            return self._per_query(attend_forward, arrays, choice, scale)
        lists, options = _lists(choice), {"scale": scale, "interpret": self.interpret}
        return attend_tiles_forward(arrays, lists, choice.blocks, choice.query_block_size, **options)

    def backward(self, arrays: Arrays, choice: Choice, results: Results, cotangents: Results, scale: float) -> Arrays:
        from pallas_kernels.tpu.per_query.backward import attend_backward
        from pallas_kernels.tpu.per_tile.backward import attend_tiles_backward

        if isinstance(choice, PerQuery):
            return self._per_query(attend_backward, arrays, choice, results, cotangents, scale)
        rest, options = (results, cotangents), {"scale": scale, "interpret": self.interpret}
        lists, size = _lists(choice), choice.query_block_size
        return attend_tiles_backward(arrays, lists, choice.blocks, size, *rest, **options)

    def _refuses_few(self, arrays: Arrays, top_k: int) -> str | None:
        from pallas_kernels.tpu import decode

        return decode.refuses(arrays, top_k)

    def _decode_few(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        from pallas_kernels.tpu import decode

        return decode.attend(arrays, indices, length, num_new, scale=scale, interpret=self.interpret)


class _GpuKernels(_Kernels):
    """What the kernels for GPUs share."""

    @property
    def platforms(self) -> tuple[str, ...] | None:
        return None if self.interpret else ("cuda",)

    def refuses(self, arrays: Arrays, choice: Choice) -> str | None:
        if not isinstance(choice, PerQuery):
            return "the GPU kernels attend choices made by every query, not per tile"
        if arrays[2].shape != arrays[1].shape:
            return f"the GPU kernels take values of key's head_dim {arrays[1].shape[3]}, got {arrays[2].shape[3]}"
        return self._refuses_query(arrays[0])

    def _refuses_query(self, query: jax.Array) -> str | None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TritonKernels(_GpuKernels):
    """The Triton kernels for NVIDIA GPUs. They have run on no GPU yet.

    Attributes:
      config: sizes of the kernels.
      interpret: whether to run on a CPU, interpreted.
    """

    config: TritonConfig = TRITON
    interpret: bool = False

    def _refuses_query(self, query: jax.Array) -> str | None:
        from pallas_kernels.gpu import tiles

        return tiles.refuses(query)

    def refuses_route(self, query: jax.Array, top_k: int) -> str | None:
        from pallas_kernels.gpu.triton import routing

        return routing.refuses(query, top_k)

    def route(self, query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool) -> jax.Array:
        from pallas_kernels.gpu.triton import routing

        options: dict[str, Any] = {"config": self.config, "interpret": self.interpret}
        return routing.route(query, key, blocks, top_k=top_k, is_causal=is_causal, **options)

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        from pallas_kernels.gpu.triton.forward import attend_forward

        return self._per_query(attend_forward, arrays, choice, scale)

    def backward(self, arrays: Arrays, choice: Choice, results: Results, cotangents: Results, scale: float) -> Arrays:
        from pallas_kernels.gpu.triton.backward import attend_backward

        return self._per_query(attend_backward, arrays, choice, results, cotangents, scale)

    def _refuses_few(self, arrays: Arrays, top_k: int) -> str | None:
        from pallas_kernels.gpu.triton import decode

        return decode.refuses(arrays, top_k)

    def _decode_few(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        from pallas_kernels.gpu.triton import decode

        options: dict[str, Any] = {"config": self.config, "interpret": self.interpret}
        return decode.attend(arrays, indices, length, num_new, scale=scale, **options)


@dataclasses.dataclass(frozen=True)
class MosaicKernels(_GpuKernels):
    """The Mosaic GPU kernels for Hopper, with the Triton router, merge and decode kernel. They have run on no GPU yet.

    Attributes:
      config: sizes of the kernels.
      router: what routes, and attends a few new tokens to a cache, where JAX has Triton; else the XLA path does.
      interpret: False, or `plgpu.InterpretGPUParams` to run on a CPU.
    """

    config: MosaicConfig = MOSAIC
    router: TritonKernels = TritonKernels()
    interpret: Any = False

    def _refuses_query(self, query: jax.Array) -> str | None:
        from pallas_kernels.gpu.mosaic import tiles

        return tiles.refuses(query)

    def refuses_route(self, query: jax.Array, top_k: int) -> str | None:
        return self._router().refuses_route(query, top_k)

    def route(self, query: jax.Array, key: jax.Array, blocks: Blocks, top_k: int, is_causal: bool) -> jax.Array:
        return self._router().route(query, key, blocks, top_k, is_causal)

    def _router(self) -> Backend:
        from pallas_kernels.gpu import tiles

        return XLA.backends[-1] if tiles.plgpu is None else self.router

    def forward(self, arrays: Arrays, choice: Choice, scale: float) -> Results:
        from pallas_kernels.gpu.mosaic.forward import attend_forward

        return self._per_query(attend_forward, arrays, choice, scale)

    def backward(self, arrays: Arrays, choice: Choice, results: Results, cotangents: Results, scale: float) -> Arrays:
        from pallas_kernels.gpu.mosaic.backward import attend_backward

        return self._per_query(attend_backward, arrays, choice, results, cotangents, scale)

    def _refuses_few(self, arrays: Arrays, top_k: int) -> str | None:
        return self.router._refuses_few(arrays, top_k)

    def _decode_few(
        self, arrays: Arrays, indices: jax.Array, length: jax.Array, num_new: jax.Array, scale: float
    ) -> jax.Array:
        return self.router._decode_few(arrays, indices, length, num_new, scale)


_KERNELS: dict[Kernels, tuple[Backend, ...]] = {
    "pallas": (TritonKernels(), MosaicKernels(), TpuKernels()),
    "mosaic": (MosaicKernels(),),
}


def resolve(implementation: Implementation | None) -> Backend:
    """The backend of that name, or the one given.

    Raises:
      ValueError: there is none of that name.
    """
    if implementation is None:
        by_kind = [(kind, backend) for kind, name in VERIFIED.items() for backend in _KERNELS[name]]
        return ByPlatform(XLA.backends, tuple(by_kind))
    if isinstance(implementation, Backend):
        if implementation.has_effects:
            return implementation
        return ByPlatform((implementation,), proven=frozenset() if isinstance(implementation, _Kernels) else None)
    if implementation not in get_args(Name):
        raise ValueError(f"implementation must be None, a backend or one of {get_args(Name)}, got {implementation!r}")
    if implementation == "reference":
        return Reference()
    if implementation == "xla":
        return XLA
    kinds = frozenset(kind for kind, name in VERIFIED.items() if name == implementation)
    return ByPlatform(_KERNELS[implementation], proven=kinds)


def _lists(choice: PerTile) -> jax.Array:
    """The ids of chosen blocks, int32 `[batch, heads, query_blocks, key_blocks]`, -1 elsewhere."""
    return jnp.where(choice.chosen, jnp.arange(choice.chosen.shape[-1], dtype=jnp.int32), -1)
