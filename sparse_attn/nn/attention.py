"""Self-attention as a module: projections around any attention that is a value, and the three the Transformer has."""

from typing import Any, Protocol, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from sparse_attn.attend.backends import Implementation
from sparse_attn.checks import check_integers
from sparse_attn.decode.cache import Cache, count_new
from sparse_attn.dense import Dense
from sparse_attn.keys import rotate
from sparse_attn.nn import key_conv
from sparse_attn.sharding import put_on_mesh
from sparse_attn.systems.moba import MoBA
from sparse_attn.window import SlidingWindow

default_kernel_init = nnx.initializers.lecun_normal()
_Cache = TypeVar("_Cache", bound=Cache)


class Attention(Protocol):
    """What `SelfAttention` takes: a frozen value such as `MoBA(...)`, `Dense()` or a system without trained arrays."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Attention output `[batch, sequence, heads, head_dim]`, of query's dtype."""


class SelfAttention(nnx.Module):
    """Multi-head self-attention: out(attention(query(x), key_conv(key(x)), value(x))).

    Parameters: query.kernel `[in_features, num_heads, head_dim]`, key.kernel and value.kernel `[in_features,
    num_key_value_heads, head_dim]`, out.kernel `[num_heads, head_dim, in_features]`, key_conv.kernel `[width,
    num_key_value_heads, head_dim]`. To shard them, wrap the initialisers in `nnx.with_partitioning`.

    Args:
      attention: what attends, see `Attention`.
      in_features: features of a token, in and out.
      num_heads: query heads.
      num_key_value_heads: key and value heads, a divisor of num_heads; None for num_heads.
      head_dim: features of a head; None for in_features / num_heads.
      key_conv_width: tokens that the key convolution spans, 0 for none. The paper uses 3 and 5.
      rope_theta: base of the rotary wavelengths of queries and keys, see `rotate`; None: no positions.
      use_bias: whether the projections have biases.
      dtype: dtype of the computation; None for the promotion of inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the query, key and value kernels.
      out_kernel_init: initialiser of the output kernel; None for kernel_init.
      key_conv_init: initialiser of the convolution kernel.
      mesh_axes: axes of the mesh of `jax.set_mesh` over which rows and heads are split for attention, for instance
        ("data", "model"); None in either place for none. Attention leaves arrays split as they come, so this is needed
        only where projections would leave them otherwise, and for the TPU kernels, which then run in a `jax.shard_map`.
        The sizes of the axes must divide the batch and num_key_value_heads.
      rngs: stream "params".
    """

    def __init__(
        self,
        *,
        attention: Attention,
        in_features: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        key_conv_width: int = 0,
        rope_theta: float | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        key_conv_init: Initializer = key_conv.default_kernel_init,
        mesh_axes: tuple[str | None, str | None] | None = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads must be a divisor of {num_heads=}, got num_key_value_heads={num_key_value_heads}"
            )
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(f"num_heads must divide {in_features=} unless head_dim is given, got {num_heads=}")
            head_dim = in_features // num_heads
        if key_conv_width < 0:
            raise ValueError(f"key_conv_width must be 0 (none) or a width of at least 1, got {key_conv_width=}")
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        def project_in(heads: int) -> nnx.LinearGeneral:
            shape = (heads, head_dim)
            return nnx.LinearGeneral(
                in_features, shape, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs, **dtypes
            )

        self.attention = attention
        self.in_features = in_features
        self.rope_theta = rope_theta
        self.mesh_axes = mesh_axes
        self.query = project_in(num_heads)
        self.key = project_in(kv_heads)
        self.value = project_in(kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features,
            axis=(-2, -1),
            use_bias=use_bias,
            kernel_init=out_kernel_init or kernel_init,
            rngs=rngs,
            **dtypes,
        )
        self.key_conv = nnx.data(
            key_conv.KeyConv(kv_heads, head_dim, key_conv_width, kernel_init=key_conv_init, rngs=rngs, **dtypes)
            if key_conv_width
            else None
        )

    def project(
        self, inputs: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values exactly as attention (and its router) takes them: rotated, the convolution applied.

        Args:
          inputs: `[batch, sequence, in_features]`.
          segment_ids: int `[batch, sequence]`.

        Returns:
          query `[batch, sequence, num_heads, head_dim]`; key and value `[batch, sequence, kv_heads, head_dim]`.
        """
        query, key, value = self._project(inputs, None)
        return query, key if self.key_conv is None else self.key_conv(key, segment_ids), value

    def _project(self, inputs: jax.Array, positions: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, rotated to positions int `[batch, sequence]` but without the convolution."""
        query, key, value = self.query(inputs), self.key(inputs), self.value(inputs)
        if self.rope_theta is not None:
            query, key = (rotate(array, self.rope_theta, positions) for array in (query, key))
        return query, key, value

    def init_cache(
        self, batch_size: int, max_length: int, *, max_draft: int = 0, dtype: jax.typing.DTypeLike | None = None
    ) -> Cache:
        """A cache without tokens, of the kind that the attention has.

        Args:
          batch_size: rows.
          max_length: tokens that a row can hold; memory is taken for all of them, or for a window.
          max_draft: tokens that `sparse_attn.decode.rollback` can take back.
          dtype: of keys, values and queries; None: the module's dtype, or else that of its parameters.

        Raises:
          NotImplementedError: the attention has no cache.
          ValueError: an argument has a wrong value, or the attention is not causal.
        """
        self._check_decodes()
        kv_heads, head_dim = self.key.out_features
        width = 0 if self.key_conv is None else self.key_conv.kernel.shape[0]
        dtype = dtype or self.key.dtype or self.key.param_dtype
        options = {"key_conv_width": width, "max_draft": max_draft, "dtype": dtype}
        attention: Any = self.attention
        return attention.init_cache(batch_size, max_length, kv_heads, head_dim, **options)

    def _check_decodes(self) -> None:
        if not hasattr(self.attention, "attend_cached"):
            raise NotImplementedError(
                f"{type(self.attention).__name__} cannot attend with a cache; MoBA, SlidingWindow and Dense can"
            )

    @overload
    def __call__(
        self,
        inputs: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
        cache: None = None,
        num_new: None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        inputs: jax.Array,
        *,
        segment_ids: None = None,
        seq_lengths: None = None,
        cache: _Cache,
        num_new: ArrayLike | None = None,
    ) -> tuple[jax.Array, _Cache]: ...

    def __call__(
        self,
        inputs: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
        cache: _Cache | None = None,
        num_new: ArrayLike | None = None,
    ) -> jax.Array | tuple[jax.Array, _Cache]:
        """Attends within each row. With a cache, inputs are the next tokens of rows that the cache holds the begin of.

        Args:
          inputs: `[batch, sequence, in_features]`.
          segment_ids: int `[batch, sequence]`, for packed sequences: tokens of equal id form one segment.
          seq_lengths: int `[batch]`, real tokens of each row; later ones are padding, and zeros come out there.
          cache: from `init_cache` or an earlier call; donate it to `jax.jit`, and nothing of its size is copied.
          num_new: int `[batch]`, with a cache: how many of the tokens are real, as seq_lengths. None: all.

        Returns:
          Array of inputs' shape; with a cache, that and the cache with the new tokens.

        Raises:
          ValueError: inputs, segment_ids, seq_lengths or num_new has a wrong shape or dtype, or does not go with (or
            without) a cache; outside jit, a row would grow beyond the cache's max_length (inside, what finds no room
            is NaN).
          NotImplementedError: a cache is given, and the attention has none.
        """
        if inputs.ndim != 3 or inputs.shape[-1] != self.in_features:
            raise ValueError(f"inputs must be [batch, sequence, {self.in_features}], got inputs.shape={inputs.shape}")
        ids = check_integers("segment_ids", segment_ids, inputs.shape[:2])
        lengths = check_integers("seq_lengths", seq_lengths, inputs.shape[:1])
        check_cache_arguments(cache, num_new, segment_ids=segment_ids, seq_lengths=seq_lengths)
        if cache is not None:
            lengths = count_new(num_new, inputs)

        def empty_padding(tokens: jax.Array) -> jax.Array:
            if lengths is None:
                return tokens
            is_real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]  # [batch, sequence]
            return jnp.where(is_real[:, :, None], tokens, 0)

        if cache is not None:
            self._check_decodes()
            position = cache.length[:, None] + jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
            arrays = self._project(empty_padding(inputs), position)
            kernel = None if self.key_conv is None else self.key_conv.kernel[...]
            output, cache = self._attend_cached(*arrays, cache, kernel, lengths)
            return empty_padding(self.out(output)), cache
        arrays = self.project(empty_padding(inputs), ids)
        if self.mesh_axes is None:
            output = self.attention(*arrays, segment_ids=segment_ids, seq_lengths=seq_lengths)
        else:
            output = self._attend_over_mesh(*arrays, ids, lengths)
        return empty_padding(self.out(output))

    def _attend_cached(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: _Cache,
        kernel: jax.Array | None,
        num_new: jax.Array | None,
    ) -> tuple[jax.Array, _Cache]:
        """`attend_cached` of the attention, by every device for its rows and heads if there are mesh_axes."""
        attention: Any = self.attention

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            cache: _Cache,
            kernel: jax.Array | None,
            num_new: jax.Array | None,
        ) -> tuple[jax.Array, _Cache]:
            return attention.attend_cached(query, key, value, cache, key_conv_kernel=kernel, num_new=num_new)

        if self.mesh_axes is None:
            return attend(query, key, value, cache, kernel, num_new)
        axes = dict(zip("bk", self.mesh_axes, strict=True))

        def spec(word: str) -> PartitionSpec:
            return PartitionSpec(*(axes.get(letter) for letter in word))

        each, cache_specs = spec("b.k"), jax.tree.map(spec, cache.axes())
        query, key, value = (put_on_mesh(array, spec("b.k.")) for array in (query, key, value))
        specs = (each, each, each, cache_specs, spec(".k"), spec("b"))
        attend = jax.shard_map(attend, in_specs=specs, out_specs=(each, cache_specs), check_vma=False)
        return attend(query, key, value, cache, kernel, num_new)

    def _attend_over_mesh(self, *operands: jax.Array | None) -> jax.Array:
        """Attention of query, key, value, segment_ids and seq_lengths, by every device for its rows and heads."""
        assert self.mesh_axes is not None
        rows, heads = self.mesh_axes
        each = PartitionSpec(rows, None, heads, None)

        def attend(
            query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None, lengths: jax.Array | None
        ) -> jax.Array:
            return self.attention(query, key, value, segment_ids=ids, seq_lengths=lengths)

        arrays = (put_on_mesh(array, each) for array in operands[:3] if array is not None)
        specs = (each, each, each, PartitionSpec(rows), PartitionSpec(rows))
        # The outputs of GPU kernels do not say over which axes they vary.
        attend = jax.shard_map(attend, in_specs=specs, out_specs=each, check_vma=False)
        return attend(*arrays, *operands[3:])


def check_cache_arguments(cache: Any, num_new: ArrayLike | None, **sequences: ArrayLike | None) -> None:
    """Raises a ValueError for arguments of a module that do not go with (or without) a cache."""
    if cache is None and num_new is not None:
        raise ValueError("num_new must be None without a cache")
    for name, array in sequences.items():
        if cache is not None and array is not None:
            raise ValueError(f"{name} must be None with a cache, in which every row is one sequence")


class Projections(TypedDict, total=False):
    """The arguments of `SelfAttention` that the modules below pass on."""

    in_features: int
    num_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    key_conv_width: int
    rope_theta: float | None
    use_bias: bool
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    out_kernel_init: Initializer | None
    key_conv_init: Initializer
    mesh_axes: tuple[str | None, str | None] | None
    rngs: nnx.Rngs


class MoBAAttention(SelfAttention):
    """Self-attention in which each query chooses `top_k` blocks of keys: `SelfAttention(attention=MoBA(...))`.

    The key convolution comes before both routing and attention. No positional encoding.
    Sources: MoBA (arXiv 2502.13189), FlashMoBA (arXiv 2511.11571).

    Args:
      block_size, top_k, is_causal, implementation: as in `moba_attention`.
      others: as in `SelfAttention`.
    """

    def __init__(
        self,
        *,
        block_size: int,
        top_k: int,
        is_causal: bool = True,
        implementation: Implementation | None = None,
        **others: Unpack[Projections],
    ):
        attention = MoBA(block_size=block_size, top_k=top_k, is_causal=is_causal, implementation=implementation)
        super().__init__(attention=attention, **others)


class DenseAttention(SelfAttention):
    """Self-attention to every token: `SelfAttention(attention=Dense(...))`.

    Args:
      is_causal: whether a token sees only tokens up to itself.
      others: as in `SelfAttention`.
    """

    def __init__(self, *, is_causal: bool = True, **others: Unpack[Projections]):
        super().__init__(attention=Dense(is_causal=is_causal), **others)


class SlidingWindowAttention(SelfAttention):
    """Causal self-attention to the last `window_size` tokens, with rotary positions.

    Args:
      window_size: tokens that a token sees, itself included, at least 1.
      others: as in `SelfAttention`; rope_theta is 10000 unless given.
    """

    def __init__(self, *, window_size: int, **others: Unpack[Projections]):
        others = {"rope_theta": 10_000.0, **others}
        super().__init__(attention=SlidingWindow(window_size=window_size), **others)
