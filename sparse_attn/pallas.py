"""Block-sparse attention by Pallas kernels: brings the library's arrays to them. The only module that imports Pallas.

The kernels of `pallas_kernels/tpu` take plain arrays; what a `Layout` means is settled here. The gradient is that of
`sparse_attn.xla`: the probabilities are computed again from the log-sum-exp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.config import KEY_MAJOR, KeyMajorConfig
from pallas_kernels.tpu import routing
from pallas_kernels.tpu.backward import attend_backward
from pallas_kernels.tpu.forward import attend_forward
from sparse_attn.layout import Layout


def route(
    query: jax.Array,
    key: jax.Array,
    layout: Layout,
    *,
    top_k: int,
    is_causal: bool,
    config: routing.RoutingConfig = routing.DEFAULT,
    interpret: Any = False,
) -> jax.Array:
    """Same as `reference.route`, by TPU kernels; config and interpret as in `attend`.

    Raises:
      NotImplementedError: a dtype that the kernels cannot do.
    """
    return routing.route(
        query,
        key,
        block_start=layout.block_start,
        block_length=layout.block_length,
        first_block=layout.first_block,
        last_block=layout.last_block,
        block_size=layout.block_size,
        top_k=top_k,
        is_causal=is_causal,
        config=config,
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
    config: KeyMajorConfig = KEY_MAJOR,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Same as `reference.attend`, by TPU kernels.

    Args:
      query, key, value, indices, layout, scale: as there.
      config: sizes inside the kernels.
      interpret: False, or `pltpu.InterpretParams` to run on a CPU.

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
    config: KeyMajorConfig = KEY_MAJOR,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `attend` for query, key and value, from its results and theirs."""
    return attend_backward(
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
        config=config,
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
    config: KeyMajorConfig,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    places = _places(layout)
    return attend_forward(query, key, value, indices, **places, scale=scale, config=config, interpret=interpret)


def _attend_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    layout: Layout,
    scale: float,
    config: KeyMajorConfig,
    interpret: Any,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    output, log_sum_exp = _attend(query, key, value, indices, layout, scale, config, interpret)
    return (output, log_sum_exp), (query, key, value, indices, layout, output, log_sum_exp)


def _attend_backward(
    scale: float, config: KeyMajorConfig, interpret: Any, residuals: tuple, gradients: tuple[jax.Array, jax.Array]
) -> tuple:
    inputs_and_results = *residuals, *gradients
    d_query, d_key, d_value = attend_gradients(*inputs_and_results, scale=scale, config=config, interpret=interpret)
    return d_query, d_key, d_value, None, None


_attend.defvjp(_attend_forward, _attend_backward)
