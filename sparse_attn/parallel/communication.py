"""What each method of context parallelism sends, from shapes alone, and which one `method=None` takes.

Bytes are those that a device receives from others: (P - 1) / P of the result of an all-gather or all-to-all over P
devices, (P - 1) / P of the operand of a reduce-scatter, both for an all-reduce. With N tokens in a row, h query and g
key/value heads of size d, c bytes a number, blocks of B, forward and for each row of the batch:

    gather      (P-1)/P N 2 g d c
    ulysses     (P-1)/P N/P (2 h + 2 max(g, P)) d c
    dispatch    R (P-1) C g (2 d c + 4 + list) + (P-1)/P N/B g d 4     R rounds of C rows; list: the ids of top_k blocks

The backward pass of the first two moves as much again. That of dispatch sends the query, its output's gradient and two
numbers, and gets the query's gradient back; the gradients of keys and values stay where the keys are. Where blocks
straddle shards, as with documents, the means are an all-reduce: twice as much. Documents add their ids, once a token,
and 4 bytes a row; copied blocks add an all-reduce of their keys and values, both ways.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from sparse_attn.parallel.layout import CONTIGUOUS, Layout

Method = Literal["ulysses", "gather", "dispatch", "ulysses+dispatch"]
METHODS = get_args(Method)
AxisName = str | tuple[str, ...]

_EVEN_ROUNDS = 4  # rounds that an even load takes. The last round is padded: fewer would waste more


class Bytes(NamedTuple):
    """What one device receives for one call."""

    forward: float
    backward: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What is known of a call of `moba_attention_sharded` when it is traced; fields as its arguments.

    Attributes:
      axis_names: the mesh axes that split the sequence, one or outer and inner.
      axis_sizes: their sizes.
      query: type of the shard `[batch, local_tokens, heads, head_dim]`; key and value likewise.
      segment_ids: type of the shard's ids `[batch, local_tokens]`, None without.
    """

    axis_names: tuple[str, ...]
    axis_sizes: tuple[int, ...]
    query: jax.ShapeDtypeStruct
    key: jax.ShapeDtypeStruct
    value: jax.ShapeDtypeStruct
    block_size: int
    top_k: int
    layout: Layout
    segment_ids: jax.ShapeDtypeStruct | None
    max_segments: int | None
    rows_per_round: int | None
    copied_blocks: int

    def __post_init__(self) -> None:
        names = self.axis_names[0] if len(self.axis_names) == 1 else self.axis_names
        self.layout.stripe_of(self.query.shape[1], f" along mesh axis {names!r} of size {self.num_shards}")
        if self.layout.stripe is not None and self.layout.stripe % self.block_size:
            raise ValueError(
                f"layout.stripe must be a multiple of block_size={self.block_size}, got {self.layout.stripe}"
            )

    @property
    def num_shards(self) -> int:
        return math.prod(self.axis_sizes)

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole row."""
        return self.query.shape[1] * self.num_shards

    @property
    def num_blocks(self) -> int:
        """Upper bound of the blocks of a row: segments of n tokens have ceil(n / block_size)."""
        if self.segment_ids is None:
            return -(-self.num_tokens // self.block_size)
        segments = min(self.max_segments or self.num_tokens, self.num_tokens)
        return min(self.num_tokens, (self.num_tokens + segments * (self.block_size - 1)) // self.block_size)

    def axes(self, method: Method) -> tuple[AxisName | None, AxisName | None]:
        """The axis along which keys or queries travel, and the one along which heads are traded for tokens."""
        both = self.axis_names[0] if len(self.axis_names) == 1 else self.axis_names
        if method == "ulysses":
            return None, both
        return (both, None) if method != "ulysses+dispatch" else self.axis_names  # type: ignore[return-value]

    def sizes(self, method: Method) -> tuple[int, int]:
        """Sizes of `axes`, 1 for none."""
        if method == "ulysses":
            return 1, self.num_shards
        return (self.num_shards, 1) if method != "ulysses+dispatch" else self.axis_sizes  # type: ignore[return-value]

    def refuses(self, method: Method) -> str | None:
        """Why the method does not fit, in words; None if it does."""
        if method == "ulysses+dispatch" and len(self.axis_names) != 2:
            return f"method 'ulysses+dispatch' takes two mesh axes (outer, inner), got axis_name={self.axis_names[0]!r}"
        (_, inner), (_, size) = self.axes(method), self.sizes(method)
        heads, kv_heads = self.query.shape[2], self.key.shape[2]
        if heads % size:
            return f"method {method!r}: mesh axis {inner!r} of size {size} must divide the {heads} query heads"
        if kv_heads % size and size % kv_heads:
            return (
                f"method {method!r}: mesh axis {inner!r} of size {size} must divide the {kv_heads} key/value heads, or "
                f"be a multiple of them"
            )
        if "dispatch" in method and self.segment_ids is not None and self.max_segments is None:
            return (
                f"method {method!r} with segment_ids needs max_segments: without it the table of block means that "
                f"every device gathers is as large as all keys"
            )
        if "dispatch" in method and self.copied_blocks and not self.is_aligned(method):
            return (
                f"method {method!r} copies whole blocks: with copied_blocks, block_size={self.block_size} must divide "
                f"the {self.query.shape[1] * size} tokens of a shard, and there are no segment_ids"
            )
        return None

    def local_heads(self, method: Method) -> tuple[int, int]:
        """Query and key/value heads of a device once heads are traded; key heads are repeated where there are fewer."""
        _, inner = self.sizes(method)
        return self.query.shape[2] // inner, max(self.key.shape[2], inner) // inner

    def is_aligned(self, method: Method) -> bool:
        """Whether every block lies on one shard of the outer axis."""
        return self.segment_ids is None and self.query.shape[1] * self.sizes(method)[1] % self.block_size == 0

    def rows(self, method: Method) -> int:
        """Queries of the heads that share a key/value head, on one shard of the outer axis."""
        heads, kv_heads = self.local_heads(method)
        return self.query.shape[1] * self.sizes(method)[1] * (heads // kv_heads)

    def even_rows(self, method: Method) -> int:
        """Rows of a key/value head that each shard asks of each other if every row asks as many as it can, evenly."""
        others = max(self.sizes(method)[0] - 1, 1)
        asked = min(max(self.top_k - self.is_aligned(method), 1), others)
        return -(-self.rows(method) * asked // others)

    def capacity(self, method: Method) -> int:
        """Rows that a round of dispatch sends to each shard for one key/value head."""
        given = self.rows_per_round or -(-self.even_rows(method) // _EVEN_ROUNDS)
        return min(given, self.rows(method))

    def bytes(self, method: Method, rounds: int | None = None) -> Bytes:
        """`communication_bytes`."""
        if rounds is None:
            rounds = -(-self.even_rows(method) // self.capacity(method))
        outer, inner = self.sizes(method)
        (batch, local_tokens, _, head_dim), value_head_dim = self.query.shape, self.value.shape[3]
        heads, kv_heads = self.local_heads(method)
        itemsize = self.query.dtype.itemsize
        exact = jnp.promote_types(self.query.dtype, jnp.float32).itemsize
        tokens = local_tokens * inner  # of a shard of the outer axis
        sizes = head_dim + value_head_dim
        ids = 0 if self.segment_ids is None else self.segment_ids.dtype.itemsize

        forward = backward = (inner - 1) / inner * batch * tokens * (heads + kv_heads) * sizes * itemsize
        forward += (inner - 1) / inner * batch * tokens * ids + (outer - 1) * batch * tokens * ids
        if method == "gather":
            moved = (outer - 1) * batch * tokens * kv_heads * sizes * itemsize
            forward, backward = forward + moved, backward + moved
        elif "dispatch" in method:
            means = (outer - 1) / outer * batch * self.num_blocks * kv_heads * head_dim * exact
            forward += means if self.is_aligned(method) else 2 * means
            if self.copied_blocks:
                copies = min(self.copied_blocks, self.num_blocks) * self.block_size * kv_heads * sizes * itemsize
                moved = 2 * (outer - 1) / outer * batch * copies
                forward += moved + 2 * (outer - 1) / outer * batch * self.num_blocks * 4
                backward += moved
            rows = rounds * batch * kv_heads * (outer - 1) * self.capacity(method)
            lists = list_dtype(self.num_blocks).itemsize * min(self.top_k, self.num_blocks) + (4 if ids else 0)
            forward += rows * (sizes * itemsize + exact + lists)
            backward += rows * ((sizes + head_dim) * itemsize + 2 * exact + lists)
        return Bytes(forward, backward)


def list_dtype(num_blocks: int) -> jnp.dtype:
    """The smallest type of a travelling list of block ids, -1 for none."""
    return jnp.dtype(jnp.int16 if num_blocks <= jnp.iinfo(jnp.int16).max else jnp.int32)


def choose_method(call: Call) -> Method:
    """The method that fits and receives the fewest bytes; among equals the first of `METHODS`."""
    fitting = [method for method in METHODS if call.refuses(method) is None]  # "gather" fits always
    return min(fitting, key=lambda method: sum(call.bytes(method)))


def communication_bytes(
    query: jax.ShapeDtypeStruct,
    key: jax.ShapeDtypeStruct,
    value: jax.ShapeDtypeStruct,
    *,
    num_shards: int | tuple[int, int],
    method: Method,
    block_size: int,
    top_k: int,
    layout: Layout = CONTIGUOUS,
    segment_ids: jax.ShapeDtypeStruct | None = None,
    max_segments: int | None = None,
    rows_per_round: int | None = None,
    copied_blocks: int = 0,
    rounds: int | None = None,
) -> Bytes:
    """Bytes that each device receives in `moba_attention_sharded` and in its backward pass.

    The formulas stand at the top of this file.

    Args:
      query, key, value: the shards, or their types (`jax.ShapeDtypeStruct`).
      num_shards: size of the mesh axis, or of both, outer and inner.
      method: as of `moba_attention_sharded`.
      block_size, top_k, layout, segment_ids, max_segments, rows_per_round, copied_blocks: as there; only the type of
        segment_ids counts.
      rounds: of dispatch, as many as the busiest pair of devices needs. None: those needed if every query chooses
        blocks on as many other shards as it can, and all shards are asked alike.

    Returns:
      Bytes a device, forward and backward.

    Raises:
      ValueError: the method does not fit the shapes.
    """
    sizes = (num_shards,) if isinstance(num_shards, int) else tuple(num_shards)
    names = ("sequence",) if len(sizes) == 1 else ("outer", "inner")
    call = Call(
        axis_names=names,
        axis_sizes=sizes,
        query=query,
        key=key,
        value=value,
        block_size=block_size,
        top_k=top_k,
        layout=layout,
        segment_ids=segment_ids,
        max_segments=max_segments,
        rows_per_round=rows_per_round,
        copied_blocks=copied_blocks,
    )
    if (reason := call.refuses(method)) is not None:
        raise ValueError(reason)
    return call.bytes(method, rounds)
