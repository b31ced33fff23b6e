"""Tiles for the Mosaic GPU kernels: the lists that describe them, rows that move by lane code, products.

Written for Hopper (sm_90a); compiled and interpreted only, has not run on a GPU.

Rows. The TMA of Hopper copies boxes, not lists of rows, so the kernels move rows themselves: every thread of a
warpgroup copies pieces of 16 bytes, into shared memory with cp.async, out of it through registers. The keys of a block
take the same way, for a block may start anywhere and end early. Tiles of rows in shared memory are `SWIZZLED`, as wgmma
reads them: cut into 8 rows x 64 numbers, 1024 bytes, in which the piece p of row r stands at place p xor r.

Products, layouts in registers and lane code stand behind the functions from `product` to `write_block`, the only ones
that know them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.blocks import Blocks
from pallas_kernels.gpu.chunks import Chunk, Plan, find_block, find_rows
from pallas_kernels.gpu.tiles import ceil_div, divide

ROWS = 64  # rows of one wgmma: the share of a warpgroup in a tile
LARGEST_KEY_SIZE = 128  # keys of a tile
LARGEST_HEAD_DIM = 128
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract, unused-ignore]
BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # a number a row of a product, in registers
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
_LANES = 128  # threads of a warpgroup
_PIECE = 16  # bytes


def refuses(query: jax.Array) -> str | None:
    """Why the kernels cannot take such queries, or so old a JAX; None if they can."""
    if jax.__version_info__ < (0, 11):
        return f"the Mosaic GPU kernels take jax 0.11 or newer, got jax {jax.__version__}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the Mosaic GPU kernels take bfloat16 and float16, the types of wgmma, got query.dtype={query.dtype}"
    if query.shape[-1] > LARGEST_HEAD_DIM:
        return (
            f"the Mosaic GPU kernels take head_dim up to {LARGEST_HEAD_DIM}, for the accumulators of the backward pass "
            f"must fit the registers, got head_dim={query.shape[-1]}"
        )
    return None


def pad_head_dim(array: jax.Array) -> jax.Array:
    """Zeros behind the last column of `[..., head_dim]`, to a width of 64 or 128."""
    padding = -array.shape[-1] % 64
    return jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, padding),)) if padding else array


def key_size(blocks: Blocks) -> int:
    """Keys of a tile: a block and what is padding behind it."""
    return ceil_div(blocks.block_size, ROWS) * ROWS


def cut_blocks(indices: jax.Array, blocks: Blocks) -> tuple[jax.Array, Blocks]:
    """Cuts blocks of more than `LARGEST_KEY_SIZE` keys into parts that count as blocks of their own.

    A choice becomes one for each part in which the query sees a key. Example: blocks of 256 keys, a query that sees 300
    keys and chose the blocks 1 and 0, `[1, 0]`: `[2, -1, 0, 1]`.

    Args:
      indices, blocks: as of `attend_forward`.

    Returns:
      Both, of the parts. Of the blocks only block_start, block_length, block_size and stop are right.
    """
    parts = ceil_div(blocks.block_size, LARGEST_KEY_SIZE)
    if parts == 1:
        return indices, blocks
    block_start, block_length = blocks.block_start, blocks.block_length
    part = jnp.arange(parts, dtype=jnp.int32).reshape(1, 1, 1, 1, parts)
    offset = part * LARGEST_KEY_SIZE
    offset_of_part = offset[0, 0]  # [1, 1, parts]
    batch_row = jnp.arange(indices.shape[0])[:, None, None, None]
    chosen = jnp.maximum(indices, 0)
    seen = jnp.minimum(block_length[batch_row, chosen], blocks.stop[:, None, :, None] - block_start[batch_row, chosen])
    is_seen = (offset < seen[..., None]) & (indices >= 0)[..., None]  # [batch, heads, queries, top_k, parts]
    indices = jnp.where(is_seen, indices[..., None] * parts + part, -1).reshape(*indices.shape[:3], -1)
    return indices, dataclasses.replace(
        blocks,
        block_start=(block_start[..., None] + offset_of_part).reshape(block_start.shape[0], -1),
        block_length=jnp.clip(block_length[..., None] - offset_of_part, 0, LARGEST_KEY_SIZE).reshape(
            block_start.shape[0], -1
        ),
        block_size=LARGEST_KEY_SIZE,
    )


class Slots(NamedTuple):
    """The pairs of a chunk's tiles, tile by tile: int32 `[slots]`, slots = chunk_heads * tiles * tile_size.

    Attributes:
      row: of the query in `[batch * queries * heads]`, -1 for no pair.
      limit: how many keys of its block the query sees, 0 for no pair.
      place: of the pair in `[chunk_heads * chunk_pairs]`, -1 for no pair.
    """

    row: jax.Array
    limit: jax.Array
    place: jax.Array


def list_slots(chunk: Chunk, blocks: Blocks, plan: Plan) -> Slots:
    """What the kernels need to know of each pair."""
    pair = chunk.schedule.pair  # [chunk_heads, tiles, tile_size]
    head = jnp.arange(plan.chunk_heads, dtype=jnp.int32)[:, None, None]
    rows = find_rows(chunk.origin, head, divide(pair, plan.top_k)[0], pair < plan.chunk_pairs, plan)
    start, length = blocks.block_start.reshape(-1), blocks.block_length.reshape(-1)
    block = find_block(chunk.origin, start, length, head, chunk.schedule.block[..., None], plan)
    stop = blocks.stop.reshape(-1).at[rows.token].get(mode="clip")
    lists = rows.place, jnp.minimum(block.length, stop - block.start), head * plan.chunk_pairs + pair
    return Slots(*(jnp.where(rows.is_real, x, none).reshape(-1) for x, none in zip(lists, (-1, 0, -1), strict=True)))


def balance(work: jax.Array, is_listed: jax.Array, num_programs: int) -> tuple[jax.Array, jax.Array]:
    """Lists items and cuts the list into runs of about equal work, one a program.

    Example: work [2, 0, 1, 1, 2], all but the second listed, for 3 programs: order [0, 2, 3, 4, ...], bounds
    [0, 1, 3, 4].

    Args:
      work: int32 `[items]`.
      is_listed: bool `[items]`.
      num_programs: how many runs.

    Returns:
      order: int32 `[items]`, the numbers of the listed items; what stands behind them is no item.
      bounds: int32 `[num_programs + 1]`; a program has the items `order[bounds[p] : bounds[p + 1]]`.
    """
    (order,) = jnp.nonzero(is_listed, size=is_listed.size, fill_value=0)
    done = jnp.cumsum(jnp.where(is_listed, work, 0), dtype=jnp.int32)  # up to and with each item
    num_items, total = is_listed.sum(dtype=jnp.int32), done[-1]
    done = done[order]
    done = jnp.where(jnp.arange(done.size) < num_items, done, jnp.iinfo(jnp.int32).max)
    program = jnp.arange(num_programs, dtype=jnp.int32)
    quotient, remainder = divide(total, num_programs)
    goal = program * quotient + jnp.minimum(program, remainder)  # work of the programs before
    bounds = jnp.searchsorted(done, goal, side="right").at[0].set(0)
    return order.astype(jnp.int32), jnp.append(bounds, num_items).astype(jnp.int32)


def product(a: Any, b: Any) -> jax.Array:
    """a b in float32, in registers; b (and a, unless it is an array) a tile in shared memory."""

    def compute(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))  # type: ignore[attr-defined]


def add_product(total: jax.Array, a: Any, b: Any) -> jax.Array:
    """total + a b, in place."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))  # type: ignore[attr-defined]


def load_numbers(ref: Any, layout: Any) -> jax.Array:
    """A list in shared memory as an array in registers."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg, unused-ignore]  # jax 0.10 asks for more


def zeros(rows: int, columns: int) -> jax.Array:
    """An accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def ranks(shape: tuple[int, ...], axis: int) -> jax.Array:
    """int32: each number of a product knows its row (axis 0) or column (axis 1)."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def opaque(number: jax.Array) -> jax.Array:
    """The int32 scalar itself, and the compiler does not know it.

    What is computed from it inside a loop, such as the addresses of tiles that stay where they are, is then computed
    in every round: kept from round to round, the addresses of all products of the backward pass take 72 registers.
    """

    def hide(_: Any, number: Any) -> Any:
        value = number.registers.item()
        hidden: Any = llvm.inline_asm(value.type, [value], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(hidden, (), is_signed=True)

    scalar = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT)
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,), return_type=scalar)(hide)(number)


def copy_listed_rows(source_ref: Any, row_ref: Any, first: jax.Array, target_ref: Any) -> None:
    """Starts to copy the rows `row_ref[first : first + rows]` of a source `[n, columns]`; zeros where it says -1.

    Args:
      source_ref, row_ref: in global memory.
      first: scalar.
      target_ref: `[rows, columns]`, `SWIZZLED` in shared memory.
    """
    rows, columns = target_ref.shape

    def lanes(_: Any, source: Any, row: Any, target: Any, first: Any) -> None:
        pieces = list(_pieces(rows, columns))
        listed = [_load_int(row, arith.addi(first.registers.item(), piece.row)) for piece in pieces]
        for piece, number in zip(pieces, listed, strict=True):
            is_real = arith.cmpi(arith.CmpIPredicate.sge, number, _int(0))
            _copy_piece(source, arith.maxsi(number, _int(0)), columns, is_real, target, piece)

    types = (plgpu.RefType(), plgpu.RefType(), plgpu.RefType(SWIZZLED), plgpu.Layout.WG_SPLAT)
    plgpu.inline_mgpu(arg_types=types)(lanes)(source_ref, row_ref, target_ref, first)


def copy_block(source_ref: Any, first: jax.Array, stride: int, length: jax.Array, target_ref: Any) -> None:
    """Starts to copy the rows first, first + stride, ... of a source `[n, columns]`, `length` of them, zeros behind.

    Args:
      source_ref: in global memory.
      first, length: scalars.
      target_ref: `[rows, columns]`, `SWIZZLED` in shared memory.
    """
    rows, columns = target_ref.shape

    def lanes(_: Any, source: Any, target: Any, first: Any, length: Any) -> None:
        for piece in _pieces(rows, columns):
            is_real = arith.cmpi(arith.CmpIPredicate.slt, piece.row, length.registers.item())
            rank = arith.select(is_real, piece.row, _int(0))
            row = arith.addi(first.registers.item(), arith.muli(rank, _int(stride)))
            _copy_piece(source, row, columns, is_real, target, piece)

    types = (plgpu.RefType(), plgpu.RefType(SWIZZLED), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
    plgpu.inline_mgpu(arg_types=types)(lanes)(source_ref, target_ref, first, length)


def close_copies(in_flight: int) -> None:
    """Makes a group of the copies since the last call, and waits until only the last `in_flight` groups are under way.

    What has arrived may be read by wgmma in any warpgroup that learns of it through a barrier.
    """

    def wait(_: Any) -> None:
        nvvm.cp_async_commit_group()
        nvvm.cp_async_wait_group(in_flight)

    plgpu.inline_mgpu()(wait)()
    plgpu.commit_smem()


def write_rows(source_ref: Any, place_ref: Any, target_ref: Any, first_column: jax.Array) -> None:
    """Writes the rows of a tile to the places listed for them, but those with a negative place.

    Args:
      source_ref: `[rows, columns]`, `SWIZZLED` in shared memory, committed.
      place_ref: int32 `[rows]`, in shared memory.
      target_ref: `[n, width]`, in global memory.
      first_column: scalar, where the rows begin in those of target_ref.
    """
    (rows, columns), width = source_ref.shape, target_ref.shape[1]

    def lanes(_: Any, source: Any, place: Any, target: Any, first: Any) -> None:
        before = arith.divui(first.registers.item(), _int(_PIECE // 2))  # pieces
        vector = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        for piece in _pieces(rows, columns):
            number = _load_int(place, piece.row)
            with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.sge, number, _int(0))):
                loaded = llvm.load(vector, _byte(source, piece.in_tile), alignment=_PIECE)
                address = _byte(target, _in_array(number, width, arith.addi(before, piece.number)))
                llvm.store(loaded, address, alignment=_PIECE)

    types = (plgpu.RefType(SWIZZLED), plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT)
    plgpu.inline_mgpu(arg_types=types)(lanes)(source_ref, place_ref, target_ref, first_column)


def write_numbers(source_ref: Any, place_ref: Any, target_ref: Any) -> None:
    """As `write_rows`, for numbers of 32 bits `[rows]`, at most as many as a warpgroup has threads."""
    (rows,) = source_ref.shape

    def lanes(_: Any, source: Any, place: Any, target: Any) -> None:
        lane = _lane()
        with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.slt, lane, _int(rows))):
            number = _load_int(place, lane)
            with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.sge, number, _int(0))):
                target_byte = arith.muli(_long(number), _long(_int(4)))
                llvm.store(_load_int(source, lane), _byte(target, target_byte))

    types = (plgpu.RefType(), plgpu.RefType(), plgpu.RefType())
    plgpu.inline_mgpu(arg_types=types)(lanes)(source_ref, place_ref, target_ref)


def write_block(source: jax.Array, target_ref: Any, first: jax.Array, length: jax.Array) -> None:
    """Writes the first `length` rows of an accumulator from the row `first` on; length may be 0 or less.

    Args:
      source: float32 `[rows, columns]`, in registers, laid out as a product.
      target_ref: float32 `[n, columns]`, in global memory.
      first, length: scalars.
    """
    columns = source.shape[1]

    def lanes(_: Any, array: Any, target: Any, first: Any, length: Any) -> None:
        int32 = ir.IntegerType.get_signless(32)
        indices = array.layout.thread_idxs(array.shape)  # row and first column of each register
        for (row, column), register in zip(indices, array.registers.flat, strict=True):
            row, column = arith.index_cast(int32, row), arith.index_cast(int32, column)
            with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.slt, row, length.registers.item())):
                number = _long(arith.addi(first.registers.item(), row))
                place = arith.addi(arith.muli(number, _long(_int(columns))), _long(column))
                llvm.store(register, _byte(target, arith.muli(place, _long(_int(4)))), alignment=8)

    types = (plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
    plgpu.inline_mgpu(arg_types=types)(lanes)(source, target_ref, first, length)


class _Piece(NamedTuple):
    """One of the pieces that a thread moves; values of the code under construction."""

    row: Any  # in the tile, int32
    number: Any  # in the row, int32
    in_tile: Any  # first byte in a swizzled tile, int32


def _pieces(rows: int, columns: int) -> Iterator[_Piece]:
    """The pieces of a thread; threads next to each other move pieces next to each other."""
    a_row = columns * 2 // _PIECE
    number, first_row = arith.remui(_lane(), _int(a_row)), arith.divui(_lane(), _int(a_row))
    for rows_before in range(0, rows, _LANES // a_row):
        row = arith.addi(first_row, _int(rows_before))
        row_of_8 = arith.remui(row, _int(8))
        box = arith.addi(arith.muli(arith.divui(row, _int(8)), _int(columns // 64)), arith.divui(number, _int(8)))
        place = arith.xori(arith.remui(number, _int(8)), row_of_8)
        in_box = arith.addi(arith.muli(row_of_8, _int(8)), place)
        yield _Piece(row, number, arith.muli(arith.addi(arith.muli(box, _int(64)), in_box), _int(_PIECE)))


def _copy_piece(source: Any, row: Any, columns: int, is_real: Any, target: Any, piece: _Piece) -> None:
    """Starts to copy a piece of a row `[n, columns]` of 16-bit numbers to its place in a tile; zeros if not real."""
    pointer = llvm.PointerType.get(address_space=1)
    nvvm.cp_async_shared_global(
        _byte(target, piece.in_tile),
        llvm.addrspacecast(pointer, _byte(source, _in_array(row, columns, piece.number))),
        _PIECE,
        nvvm.LoadCacheModifierKind.CG,
        cp_size=arith.select(is_real, _int(_PIECE), _int(0)),
    )


def _in_array(row: Any, columns: int, piece: Any) -> Any:
    """First byte of the piece of that number of a row in an array `[n, columns]` of 16-bit numbers, int64."""
    in_row = arith.muli(_long(piece), _long(_int(_PIECE)))
    return arith.addi(arith.muli(_long(row), _long(_int(2 * columns))), in_row)


def _lane() -> Any:
    return arith.remui(mgpu_utils.thread_idx(), _int(_LANES))


def _int(number: int) -> Any:
    return mgpu.c(number, ir.IntegerType.get_signless(32))


def _long(number: Any) -> Any:
    return arith.extsi(ir.IntegerType.get_signless(64), number)


def _byte(ref: Any, offset: Any) -> Any:
    """Address of a byte of an array in memory."""
    return mgpu_utils.getelementptr(mgpu_utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def _load_int(ref: Any, index: Any) -> Any:
    int32 = ir.IntegerType.get_signless(32)
    return llvm.load(int32, mgpu_utils.getelementptr(mgpu_utils.memref_ptr(ref), [index], int32))
