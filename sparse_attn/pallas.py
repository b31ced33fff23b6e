"""Block-sparse attention by Pallas kernels: brings the library's arrays to them. The only module that imports Pallas.

The kernels of `pallas_kernels/tpu` and `pallas_kernels/gpu` take plain arrays; what a `Layout` means is settled here.
The platform decides which of them run, or the configuration where one is given.
"""

import dataclasses
import importlib
import types
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels.config import KeyMajorConfig, MosaicConfig, TritonConfig
from sparse_attn import derivatives, tiles, xla
from sparse_attn.derivatives import Arrays, Results
from sparse_attn.layout import Layout
from sparse_attn.sharding import over_auto_axes, vary_alike
from sparse_attn.visibility import Visibility

if TYPE_CHECKING:
    from pallas_kernels.tpu.routing import RoutingConfig

Config = KeyMajorConfig | TritonConfig | MosaicConfig


def _kernels(name: str, config: Any) -> types.ModuleType:
    """The module of that name among the kernels that config is made for; for None among those of the platform."""
    is_gpu = jax.default_backend() == "gpu"
    if is_gpu:
        warnings.warn(
            "the GPU kernels are compiled and interpreted in tests but have not run on a GPU yet; "
            "implementation='xla' is the proven path",
            stacklevel=2,
        )
    if isinstance(config, MosaicConfig):
        name = f"mosaic_{name}"
    is_gpu = is_gpu if config is None else isinstance(config, TritonConfig | MosaicConfig)
    return importlib.import_module(f"pallas_kernels.{'gpu' if is_gpu else 'tpu'}.{name}")


def _sizes(config: Any) -> dict[str, Any]:
    return {} if config is None else {"config": config}


def route(
    query: jax.Array,
    key: jax.Array,
    layout: Layout,
    *,
    top_k: int,
    is_causal: bool,
    config: "RoutingConfig | TritonConfig | None" = None,
    interpret: Any = False,
) -> jax.Array:
    """Same as `reference.route`, by kernels; config and interpret as in `attend`.

    Raises:
      NotImplementedError: a dtype, head_dim or top_k that the kernels cannot do.
    """
    route = _kernels("routing", config).route

    def call(query: jax.Array, key: jax.Array, layout: Layout) -> jax.Array:
        return route(
            query,
            key,
            block_start=layout.block_start,
            block_length=layout.block_length,
            first_block=layout.first_block,
            last_block=layout.last_block,
            block_size=layout.block_size,
            top_k=top_k,
            is_causal=is_causal,
            **_sizes(config),
            interpret=interpret,
        )

    if interpret:  # has effects: see `derivatives.Backend`
        return call(query, key, layout)
    operands, group = vary_alike((query, key, layout)), query.shape[2] // key.shape[2]
    return over_auto_axes(call, operands, ("b.h", "b.k", "b"), "bh", group=group)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    layout: Layout,
    *,
    scale: float,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Same as `reference.attend`, by kernels.

    Args:
      query, key, value, indices, layout, scale: as there.
      config: sizes inside the kernels; None for those of the platform's kernels.
      interpret: False, or what makes the kernels run on a CPU: `pltpu.InterpretParams` for TPU, True for GPU,
        `plgpu.InterpretGPUParams` for a `MosaicConfig`.

    Raises:
      NotImplementedError: a dtype, head_dim, block_size or top_k that the kernels cannot do.
    """
    backend = PerQueryKernels(scale, config=config, interpret=interpret)
    return derivatives.attend(backend, (query, key, value), (indices, layout))


def attend_tiles(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    chosen: jax.Array,
    visibility: Visibility,
    query_block_size: int,
    key_block_size: int,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`sparse_attn.tiles.attend_tiles` by the TPU kernels: output and log-sum-exp.

    Args:
      query, key, value, visibility, scale: as there, finite numbers in the padding.
      chosen: bool `[batch, heads, query_blocks, key_blocks]`.
      query_block_size: queries in a tile.
      key_block_size: keys in a block.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

    Raises:
      NotImplementedError: a dtype or block size that the kernels cannot do.
    """
    no_weight = jnp.zeros((*key.shape[:2], 1), jnp.float32)
    backend = PerTileKernels(query_block_size, key_block_size, scale, interpret=interpret)
    return derivatives.attend(backend, (query, key, value), tiles.Choice(chosen, visibility, no_weight))


@dataclasses.dataclass(frozen=True)
class PerQueryKernels(xla.PerQuery):
    """The backend: attention of every query over its own list of blocks, by kernels.

    Outputs leave the kernels in the query's dtype, and the backward pass takes delta = sum(dO O) from these: for 16-bit
    inputs with large logits dQ and dK are two to three times as wrong as with a float32 output, which would double what
    the kernels write.
    """

    config: Config | None = None
    interpret: Any = False

    @property
    def has_effects(self) -> bool:
        return bool(self.interpret)

    def _options(self, layout: Layout) -> dict[str, Any]:
        return {
            "block_start": layout.block_start,
            "block_length": layout.block_length,
            "key_stop": layout.key_stop,
            "block_size": layout.block_size,
            "is_packed": layout.key_order is not None,
            "scale": self.scale,
            "interpret": self.interpret,
            **_sizes(self.config),
        }

    def forward(self, arrays: Arrays, choice: xla.Choice) -> Results:
        indices, layout = choice
        attend_forward = _kernels("forward", self.config).attend_forward
        return attend_forward(*arrays, _reachable(indices, layout), **self._options(layout))

    def backward(self, arrays: Arrays, choice: xla.Choice, results: Results, cotangents: Results) -> Arrays:
        indices, layout = choice
        attend_backward = _kernels("backward", self.config).attend_backward
        reachable = _reachable(indices, layout)
        return attend_backward(*arrays, reachable, *results, *cotangents, **self._options(layout))


@dataclasses.dataclass(frozen=True)
class PerTileKernels(tiles.PerTile):
    """The backend: attention of every tile of queries over its own list of blocks, by the TPU kernels."""

    interpret: Any = False

    @property
    def has_effects(self) -> bool:
        return bool(self.interpret)

    def _options(self) -> dict[str, Any]:
        return {
            "query_block_size": self.query_block_size,
            "key_block_size": self.key_block_size,
            "scale": self.scale,
            "interpret": self.interpret,
        }

    def forward(self, arrays: Arrays, choice: tiles.Choice) -> Results:
        from pallas_kernels.tpu.forward_tiles import attend_tiles_forward

        return attend_tiles_forward(*arrays, _lists(choice.chosen), *choice.visibility, **self._options())

    def backward(self, arrays: Arrays, choice: tiles.Choice, results: Results, cotangents: Results) -> Arrays:
        from pallas_kernels.tpu.backward_tiles import attend_tiles_backward

        lists = _lists(choice.chosen)
        return attend_tiles_backward(*arrays, lists, *choice.visibility, *results, *cotangents, **self._options())


def _reachable(indices: jax.Array, layout: Layout) -> jax.Array:
    """The choice without blocks that hold nothing for the query: `[batch, heads, queries, top_k]`, -1 for those."""
    first, last = layout.first_block[:, None, :, None], layout.last_block[:, None, :, None]  # [batch, 1, queries, 1]
    return jnp.where((first <= indices) & (indices <= last), indices, -1)


def _lists(chosen: jax.Array) -> jax.Array:
    """The ids of chosen blocks, int32 like chosen, -1 elsewhere."""
    return jnp.where(chosen, jnp.arange(chosen.shape[-1], dtype=jnp.int32), -1)
