"""What the systems share: a system is a frozen value that is called like a function.

    attention = XAttention(threshold=0.9)
    output = attention(query, key, value)     # array like query
    levels = attention.select(query, key)     # the choice alone

Its fields are hyperparameters, checked when it is made; arrays that a system is trained with (gates, projections) are
arguments of the call. Equal systems are equal, hash alike and pickle. `sparse_attn.nn.SelfAttention` makes a layer of
any system that takes query, key and value alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from pallas_kernels.blocks import Arrays
from sparse_attn.attend.backends import Implementation
from sparse_attn.attend.partial import Partial
from sparse_attn.checks import check_arrays, check_attention, check_integers, check_scale, check_self_attention
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import explicit_sharding, splits_over_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A system that chooses for tiles of queries. A subclass defines `_select`, and `_attend` if it does more than
    exact softmax attention over its choice.

    Attributes:
      scale: factor of the logits. None: 1 / sqrt(head_dim).
      implementation: of the exact attention, as in `moba_attention`.
      paper: arXiv number.
      is_trainable: whether gradients are part of the published system and tested here.
      traces_sequences: whether segment_ids and seq_lengths may be traced.
    """

    scale: float | None = None
    implementation: Implementation | None = None

    paper: ClassVar[str]
    is_trainable: ClassVar[bool] = False
    traces_sequences: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_scale(self.scale)

    if TYPE_CHECKING:  # not at run time, where a field without a default would take the property for one

        @property
        def is_causal(self) -> bool:
            """Whether a query sees only keys up to its own position: an attribute or field of every system."""

    @property
    def whole(self) -> str:
        """Letters of axes that no device may have a part of (see `sparse_attn.sharding`): "h" if heads compete."""
        return ""

    def check(self, query: jax.Array, key: jax.Array) -> None:
        """Raises a ValueError, that names the argument, for arrays that the system has no meaning for."""
        check_self_attention(query, key)

    def factor(self, query: jax.Array) -> float:
        """The factor of the logits."""
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @splits_over_mesh("bh", whole=lambda self: self.whole)
    def select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        """Which key blocks each tile of queries attends, without a gradient.

        Args:
          query: `[batch, queries, heads, head_dim]`, floating point.
          key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.

        Raises:
          ValueError: an argument has a wrong shape or dtype.
        """
        query, key = map(jnp.asarray, (query, key))
        check_arrays(query, {"key": key})
        self.check(query, key)
        return self._select(*jax.lax.stop_gradient((query, key)))

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """Attention of every query over what its tile chose; softmax and sums are float32.

        Args:
          query: `[batch, queries, heads, head_dim]`, floating point.
          key: `[batch, keys, kv_heads, head_dim]`, of query's dtype; heads is a multiple of kv_heads.
          value: shaped like key.
          segment_ids: int `[batch, sequence]`, for packed self-attention: every segment is a sequence of its own.
          seq_lengths: int `[batch]`, real tokens of each row of self-attention; zeros come out behind them. Both must
            be known when the call is traced (see `by_sequence`).

        Returns:
          Array `[batch, queries, heads, head_dim]` of query's dtype.

        Raises:
          ValueError: an argument has a wrong shape, dtype or value.
        """
        return by_sequence(lambda _, *arrays: self._call(*arrays), (query, key, value), segment_ids, seq_lengths)

    @splits_over_mesh(whole=lambda self: self.whole)
    def _call(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        levels = self._select(*jax.lax.stop_gradient((query, key)))
        return self._attend(query, key, value, levels).output().astype(query.dtype)

    def _checked(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Arrays:
        """The arrays of a call, checked."""
        query, key, value = map(jnp.asarray, (query, key, value))
        check_attention(query, key, value, self.scale)
        self.check(query, key)
        return query, key, value

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        """`select` of checked arrays."""
        raise NotImplementedError

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap) -> Partial:
        """Attention over the choice: exact at level 1."""
        blocks = whole_rows(query, key, block_size=levels.key_block_size, is_causal=self.is_causal)
        scale, implementation = self.factor(query), self.implementation
        return attend_levels(query, key, value, levels, blocks, scale=scale, implementation=implementation)


def by_sequence(
    call: Callable[..., jax.Array],
    arrays: tuple[jax.Array, ...],
    segment_ids: ArrayLike | None,
    seq_lengths: ArrayLike | None,
) -> jax.Array:
    """call(row, *arrays) of every sequence in packed or padded rows by itself, put back in place; zeros for padding.
    Without segment_ids and seq_lengths one call of all rows.

    A choice by tiles depends on where a sequence begins and how long it is, often through numbers of blocks that are
    shapes. So each sequence is cut out, of its own length, and the program grows with the number of sequences.

    Args:
      call: takes the row `slice` of the batch that the sequence stands in, and the arrays `[1, length, ...]`.
      arrays: `[batch, sequence, ...]`.
      segment_ids: int `[batch, sequence]`, or None.
      seq_lengths: int `[batch]`, or None.

    Raises:
      ValueError: segment_ids or seq_lengths has a wrong shape or dtype, or is not known when the call is traced; the
        arrays are not of one length.
    """
    if segment_ids is None and seq_lengths is None:
        return call(slice(None), *arrays)
    query = arrays[0]
    given = {"segment_ids": (segment_ids, query.shape[:2]), "seq_lengths": (seq_lengths, query.shape[:1])}
    known = {}
    for name, (array, shape) in given.items():
        if isinstance(array, jax.core.Tracer):
            raise ValueError(
                f"{name} must be known when the call is traced, for the choice depends on it through shapes: pass a "
                "NumPy array from outside of jit, or call the system for each sequence"
            )
        with jax.ensure_compile_time_eval():
            array = check_integers(name, array, shape)
        known[name] = None if array is None else np.asarray(array)
    shapes = [array.shape for array in arrays]
    if len({shape[:2] for shape in shapes}) > 1:
        raise ValueError(
            f"segment_ids and seq_lengths are those of self-attention: arrays must begin alike, got shapes {shapes}"
        )
    # On a mesh of Explicit axes sequences are cut from rows that every device has whole.
    arrays = tuple(x if explicit_sharding(x) is None else jax.sharding.reshard(x, PartitionSpec()) for x in arrays)
    ids = np.zeros(query.shape[:2], int) if known["segment_ids"] is None else known["segment_ids"]
    lengths = np.full(len(ids), ids.shape[1]) if known["seq_lengths"] is None else known["seq_lengths"]
    output = None
    for row, (ids_of_row, length) in enumerate(zip(ids, lengths, strict=True)):
        for segment in np.unique(ids_of_row[: max(length, 0)]):
            places = np.flatnonzero(ids_of_row[: max(length, 0)] == segment)
            part = call(slice(row, row + 1), *(array[row : row + 1, places] for array in arrays))
            if output is None:
                output = jnp.zeros((*query.shape[:2], *part.shape[2:]), part.dtype)
            output = output.at[row, places].set(part[0])
    if output is None:  # no sequence at all
        part = jax.eval_shape(functools.partial(call, slice(0, 1)), *(array[:1] for array in arrays))
        return jnp.zeros((*query.shape[:2], *part.shape[2:]), part.dtype)
    return output


def per_head(threshold: float | tuple[float, ...], num_heads: int) -> jax.Array:
    """One number, or one for each head, as float32 `[heads or 1, 1, 1]`.

    Raises:
      ValueError: there is not one for each head.
    """
    if isinstance(threshold, tuple) and len(threshold) != num_heads:
        raise ValueError(f"threshold must be a number or one for each of {num_heads} heads, got {threshold=}")
    return jnp.asarray(threshold, jnp.float32).reshape(-1, 1, 1)
