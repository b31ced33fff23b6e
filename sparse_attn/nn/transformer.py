"""The hybrid decoder-only Transformer of FlashMoBA."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Initializer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from sparse_attn.attend.backends import Implementation
from sparse_attn.decode.cache import Cache
from sparse_attn.nn import key_conv
from sparse_attn.nn.attention import (
    DenseAttention,
    MoBAAttention,
    SelfAttention,
    SlidingWindowAttention,
    check_cache_arguments,
)
from sparse_attn.nn.config import LayerKind, TransformerConfig
from sparse_attn.nn.generate import Generated, Options, Prompts, collect, stream
from sparse_attn.sharding import explicit_sharding, put_on_mesh

# Names the axes of a parameter, or leaves its initialiser as it is.
NameAxes = Callable[..., Initializer]


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)). Source: GLU variants (arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig, *, name_axes: NameAxes, rngs: nnx.Rngs):
        init = name_axes(nnx.initializers.lecun_normal(), "embed", "mlp")
        down_init = name_axes(_residual_init(config), "mlp", "embed")
        options: dict[str, Any] = {
            "use_bias": False,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        self.gate = nnx.Linear(config.hidden_size, config.mlp_size, kernel_init=init, **options)
        self.up = nnx.Linear(config.hidden_size, config.mlp_size, kernel_init=init, **options)
        self.down = nnx.Linear(config.mlp_size, config.hidden_size, kernel_init=down_init, **options)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(inputs)) * self.up(inputs))


class TransformerLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: TransformerConfig,
        kind: LayerKind,
        *,
        name_axes: NameAxes,
        mesh_axes: tuple[str | None, str | None] | None,
        moba_options: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        self.attention_norm = _make_norm(config, rngs)
        self.attention = _make_attention(config, kind, name_axes, mesh_axes, moba_options, rngs)
        self.mlp_norm = _make_norm(config, rngs)
        self.mlp = SwiGLU(config, name_axes=name_axes, rngs=rngs)

    def __call__(self, hidden: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        hidden = hidden + self.attention(self.attention_norm(hidden), segment_ids=segment_ids)
        return hidden + self.mlp(self.mlp_norm(hidden))

    def extend(self, hidden: jax.Array, cache: Cache, num_new: ArrayLike | None) -> tuple[jax.Array, Cache]:
        """The same of the next tokens of rows that the cache holds the begin of."""
        output, cache = self.attention(self.attention_norm(hidden), cache=cache, num_new=num_new)
        hidden = hidden + output
        return hidden + self.mlp(self.mlp_norm(hidden)), cache


class Transformer(nnx.Module):
    """Decoder-only language model: embedding, layers of alternating attention, RMSNorm, logits.

    Sliding-window layers carry rotary positions; MoBA and dense layers have no positional encoding.
    Source: FlashMoBA (arXiv 2511.11571), experiments.

    Attributes:
      config: the sizes.
      layers: the layers in order; with scan_layers, one for each place in the pattern, whose parameters have a leading
        axis of length num_layers / len(layer_pattern).

    Args:
      config: the sizes.
      logical_axes: whether parameters name their axes "vocab", "embed", "heads", "head_dim" and "mlp" (a stacking axis
        and norms have none). Flax then places each parameter as it is made: build the model inside `jax.set_mesh(mesh)`
        and `nnx.logical_axis_rules(rules)`, rules mapping every name to a mesh axis or None.
      mesh_axes: mesh axes of batch rows and heads, as in `SelfAttention`; the rows are split so between layers too.
      implementation: of the moba layers, as in `moba_attention`.
      rngs: stream "params". The same key gives the same parameters, stacked or not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        logical_axes: bool = False,
        mesh_axes: tuple[str | None, str | None] | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        def name_axes(init: Initializer, *names: str | None) -> Initializer:
            return nnx.with_partitioning(init, names) if logical_axes else init

        self.config = config
        self.mesh_axes = mesh_axes
        dtypes: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        embedding_init = name_axes(nnx.initializers.normal(config.hidden_size**-0.5), "vocab", "embed")
        self.embedding = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=embedding_init, rngs=rngs, **dtypes
        )
        keys = jax.random.split(rngs.params(), config.num_layers)
        moba_options = {"implementation": implementation}

        def make_layer(key: jax.Array, kind: LayerKind) -> TransformerLayer:
            return TransformerLayer(
                config, kind, name_axes=name_axes, mesh_axes=mesh_axes, moba_options=moba_options, rngs=nnx.Rngs(key)
            )

        if config.scan_layers:
            make_layers = nnx.vmap(make_layer, in_axes=(0, None), transform_metadata={nnx.PARTITION_NAME: None})
            period = len(config.layer_pattern)
            self.layers = nnx.List([make_layers(keys[i::period], kind) for i, kind in enumerate(config.layer_pattern)])
        else:
            self.layers = nnx.List([make_layer(*each) for each in zip(keys, config.layer_kinds, strict=True)])
        self.norm = _make_norm(config, rngs)
        self.head = nnx.data(
            None
            if config.tie_embeddings
            else nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=name_axes(nnx.initializers.lecun_normal(), "embed", "vocab"),
                preferred_element_type=jnp.float32,
                rngs=rngs,
                **dtypes,
            )
        )

    def init_cache(self, batch_size: int, max_length: int, *, max_draft: int = 0) -> tuple[Cache, ...]:
        """Caches without tokens, one for each layer, stacked layers too; see `SelfAttention.init_cache`."""
        return tuple(
            layer.attention.init_cache(batch_size, max_length, max_draft=max_draft, dtype=self.config.dtype)
            for layer in self._unstacked_layers()
        )

    @overload
    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, cache: None = None, num_new: None = None
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: None = None,
        *,
        cache: tuple[Cache, ...],
        num_new: ArrayLike | None = None,
    ) -> tuple[jax.Array, tuple[Cache, ...]]: ...

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        cache: tuple[Cache, ...] | None = None,
        num_new: ArrayLike | None = None,
    ) -> jax.Array | tuple[jax.Array, tuple[Cache, ...]]:
        """Predicts the next token everywhere. With a cache, tokens are the next of rows that it holds the begin of.

        Args:
          tokens: int `[batch, sequence]`, below vocab_size.
          segment_ids: int `[batch, sequence]`, for packed sequences: tokens of equal id form one segment.
          cache: from `init_cache` or an earlier call; donate it to `jax.jit`, and nothing of its size is copied.
          num_new: int `[batch]`, with a cache: how many of the tokens are real; the first ones are. None: all.

        Returns:
          Logits float32 `[batch, sequence, vocab_size]`; with a cache, those and the cache with the new tokens.

        Raises:
          ValueError: an argument has a wrong shape or dtype; outside jit, a row would grow beyond the cache's
            max_length (inside, what finds no room is NaN).
        """
        check_cache_arguments(cache, num_new, segment_ids=segment_ids)
        if cache is not None:
            hidden, cache = self.extend(tokens, cache, num_new)
            return self.logits(hidden), cache
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """What the last layer gives `[batch, sequence, hidden_size]`: what `logits` takes. Arguments as of the call."""
        hidden = self._split_rows(self._embed(tokens))

        def apply_layer(layer: TransformerLayer, hidden: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
            return self._split_rows(layer(hidden, segment_ids))

        apply_layer = nnx.remat(apply_layer) if self.config.remat else apply_layer

        def apply_layers(
            layers: Sequence[TransformerLayer], hidden: jax.Array, segment_ids: jax.Array | None
        ) -> jax.Array:
            for layer in layers:
                hidden = apply_layer(layer, hidden, segment_ids)
            return hidden

        if self.config.scan_layers:
            apply_layers = nnx.scan(
                apply_layers,
                in_axes=(0, nnx.Carry, None),
                out_axes=nnx.Carry,
                transform_metadata={nnx.PARTITION_NAME: None},
            )
        return apply_layers(self.layers, hidden, segment_ids)

    def extend(
        self, tokens: jax.Array, cache: tuple[Cache, ...], num_new: ArrayLike | None = None
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """What the call with a cache does before `logits`: hidden `[batch, sequence, hidden_size]`, and the cache.

        Stacked layers are not scanned here: a scan would copy each layer's cache out of the stack and back again, which
        costs more than sparse attention reads.
        """
        hidden, extended = self._embed(tokens), []
        for layer, before in zip(self._unstacked_layers(), cache, strict=True):
            hidden, after = layer.extend(hidden, before, num_new)
            extended.append(after)
        return hidden, tuple(extended)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[batch, sequence, vocab_size]` of what the last layer gives."""
        hidden = self.norm(hidden)
        if self.head is not None:
            return self.head(hidden)
        embedding = self.embedding.embedding[...].astype(hidden.dtype)
        return jnp.einsum("btf,vf->btv", hidden, embedding, preferred_element_type=jnp.float32)

    def generate(self, prompts: Prompts, **options: Unpack[Options]) -> Generated:
        """Continues prompts by up to max_new_tokens tokens each: `sparse_attn.nn.generate.stream`, collected."""
        return collect(self, prompts, **options)

    def stream(self, prompts: Prompts, **options: Unpack[Options]) -> Iterator[np.ndarray]:
        """Continues prompts and yields the tokens as they come: `sparse_attn.nn.generate.stream`."""
        return stream(self, prompts, **options)

    def unstacked(self) -> "Transformer":
        """The same model with scan_layers=False: the layers' parameters taken out of the stacks, the others shared."""
        model = nnx.merge(*nnx.split(self))
        model.layers = nnx.List(list(self._unstacked_layers()))
        model.config = dataclasses.replace(self.config, scan_layers=False)
        return model

    def attention_inputs(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """What attention and its router see: queries, (convolved) keys and values of every moba and dense layer.

        For a dense layer, what another system put in its place would see.

        Args: as of the call.

        Returns:
          For each such layer, in order, query `[batch, sequence, num_heads, head_dim]`, key and value `[batch,
          sequence, kv_heads, head_dim]`.
        """
        hidden, inputs = self._embed(tokens), []
        for layer, kind in zip(self._unstacked_layers(), self.config.layer_kinds, strict=True):
            if kind != "sliding_window":
                inputs.append(layer.attention.project(layer.attention_norm(hidden), segment_ids))
            hidden = layer(hidden, segment_ids)
        return inputs

    def _embed(self, tokens: jax.Array) -> jax.Array:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be an integer array [batch, sequence], got {tokens.dtype}{tokens.shape}")
        # On a mesh of Explicit axes a gather asks how its result is split: as the tokens are.
        return self.embedding(tokens, out_sharding=explicit_sharding(tokens))

    def _split_rows(self, hidden: jax.Array) -> jax.Array:
        """hidden `[batch, sequence, hidden_size]`, split over the mesh as its rows are and in no other way."""
        return hidden if self.mesh_axes is None else put_on_mesh(hidden, PartitionSpec(self.mesh_axes[0]))

    def _unstacked_layers(self) -> Iterator[TransformerLayer]:
        """The layers, first to last, one by one."""
        if not self.config.scan_layers:
            yield from self.layers
            return
        for index in range(self.config.num_layers):
            repeat, place = divmod(index, len(self.config.layer_pattern))
            graph, state = nnx.split(self.layers[place])
            yield nnx.merge(graph, jax.tree.map(lambda array, repeat=repeat: array[repeat], state))


def _make_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


def _make_attention(
    config: TransformerConfig,
    kind: LayerKind,
    name_axes: NameAxes,
    mesh_axes: tuple[str | None, str | None] | None,
    moba_options: dict[str, Any],
    rngs: nnx.Rngs,
) -> SelfAttention:
    options: dict[str, Any] = {
        "in_features": config.hidden_size,
        "num_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads or None,
        "head_dim": config.head_dim,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "kernel_init": name_axes(nnx.initializers.lecun_normal(), "embed", "heads", "head_dim"),
        "out_kernel_init": name_axes(_residual_init(config), "heads", "head_dim", "embed"),
        "mesh_axes": mesh_axes,
        "rngs": rngs,
    }
    if kind == "sliding_window":
        return SlidingWindowAttention(window_size=config.window_size, rope_theta=config.rope_theta, **options)
    options["key_conv_width"] = config.key_conv_width
    options["key_conv_init"] = name_axes(key_conv.default_kernel_init, None, "heads", "head_dim")
    if kind == "moba":
        options |= {"block_size": config.block_size, "top_k": config.top_k, **moba_options}
        return MoBAAttention(**options)
    return DenseAttention(**options)


def _residual_init(config: TransformerConfig) -> Initializer:
    """Variance 1 / (fan_in * 2 num_layers), so that the sum over all residual branches starts of order 1."""
    return nnx.initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "normal")
