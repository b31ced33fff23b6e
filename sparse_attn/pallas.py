"""Block-sparse attention by Pallas kernels: brings the library's arrays to them. The only module that imports Pallas.

The kernels of `pallas_kernels/tpu` and `pallas_kernels/gpu` take plain arrays; what a `Layout` means is settled here.
The platform decides which of them run, or the configuration where one is given. The gradient is that of
`sparse_attn.xla`: the probabilities are computed again from the log-sum-exp.
"""

import functools
import importlib
import types
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels.config import KeyMajorConfig, MosaicConfig, TritonConfig
from sparse_attn.layout import Layout
from sparse_attn.visibility import Visibility

if TYPE_CHECKING:
    from pallas_kernels.tpu.routing import RoutingConfig


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
    return _kernels("routing", config).route(
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


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    layout: Layout,
    *,
    scale: float,
    config: KeyMajorConfig | TritonConfig | MosaicConfig | None = None,
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
    indices = _reachable(indices, layout)
    return _attend(query, key, value, indices, layout, scale, config, interpret)


def attend_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    layout: Layout,
    output: jax.Array,
    log_sum_exp: jax.Array,
    d_output: jax.Array,
    d_log_sum_exp: jax.Array,
    *,
    scale: float,
    config: KeyMajorConfig | TritonConfig | MosaicConfig | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `attend` for query, key and value, from its results and theirs."""
    return _kernels("backward", config).attend_backward(
        query,
        key,
        value,
        _reachable(indices, layout),
        output,
        log_sum_exp,
        d_output,
        d_log_sum_exp,
        **_places(layout),
        scale=scale,
        **_sizes(config),
        interpret=interpret,
    )


def _reachable(indices: jax.Array, layout: Layout) -> jax.Array:
    """The choice without blocks that hold nothing for the query: `[batch, heads, queries, top_k]`, -1 for those."""
    first, last = layout.first_block[:, None, :, None], layout.last_block[:, None, :, None]  # [batch, 1, queries, 1]
    return jnp.where((first <= indices) & (indices <= last), indices, -1)


def _places(layout: Layout) -> dict[str, Any]:
    """What the kernels need to know of a layout."""
    return {
        "block_start": layout.block_start,
        "block_length": layout.block_length,
        "key_stop": layout.key_stop,
        "block_size": layout.block_size,
        "is_packed": layout.key_order is not None,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    layout: Layout,
    scale: float,
    config: KeyMajorConfig | TritonConfig | MosaicConfig | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    options = {**_places(layout), **_sizes(config), "scale": scale, "interpret": interpret}
    return _kernels("forward", config).attend_forward(query, key, value, indices, **options)


def _attend_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    layout: Layout,
    scale: float,
    config: KeyMajorConfig | TritonConfig | MosaicConfig | None,
    interpret: Any,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    output, log_sum_exp = _attend(query, key, value, indices, layout, scale, config, interpret)
    return (output, log_sum_exp), (query, key, value, indices, layout, output, log_sum_exp)


def _attend_backward(
    scale: float,
    config: KeyMajorConfig | TritonConfig | MosaicConfig | None,
    interpret: Any,
    residuals: tuple,
    gradients: tuple[jax.Array, jax.Array],
) -> tuple:
    inputs_and_results = *residuals, *gradients
    d_query, d_key, d_value = attend_gradients(*inputs_and_results, scale=scale, config=config, interpret=interpret)
    return d_query, d_key, d_value, None, None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
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
    from pallas_kernels.tpu.forward_tiles import attend_tiles_forward

    arrays = query, key, value, _lists(chosen), *visibility
    sizes: dict[str, Any] = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    return attend_tiles_forward(*arrays, **sizes, scale=scale, interpret=interpret)


def _lists(chosen: jax.Array) -> jax.Array:
    """The ids of chosen blocks, int32 like chosen, -1 elsewhere."""
    return jnp.where(chosen, jnp.arange(chosen.shape[-1], dtype=jnp.int32), -1)


def _attend_tiles_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    chosen: jax.Array,
    visibility: Visibility,
    query_block_size: int,
    key_block_size: int,
    scale: float,
    interpret: Any,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    sizes = query_block_size, key_block_size
    output, log_sum_exp = attend_tiles(query, key, value, chosen, visibility, *sizes, scale, interpret)
    return (output, log_sum_exp), (query, key, value, _lists(chosen), *visibility, output, log_sum_exp)


def _attend_tiles_backward(
    query_block_size: int,
    key_block_size: int,
    scale: float,
    interpret: Any,
    residuals: tuple,
    gradients: tuple[jax.Array, jax.Array],
) -> tuple:
    from pallas_kernels.tpu.backward_tiles import attend_tiles_backward

    sizes: dict[str, Any] = {"query_block_size": query_block_size, "key_block_size": key_block_size}
    arguments = *residuals, *gradients
    d_query, d_key, d_value = attend_tiles_backward(*arguments, **sizes, scale=scale, interpret=interpret)
    return d_query, d_key, d_value, None, None


attend_tiles.defvjp(_attend_tiles_forward, _attend_tiles_backward)
