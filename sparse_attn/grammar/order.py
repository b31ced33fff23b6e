"""Order: permutations of tokens that bring related ones together, so that blocks of consecutive tokens are of a kind.

A permutation is int32 `[tokens]`: the original index of the token at each place, so that `array[:, order]` is the array
in the new order and `inverse(order)` gives every token's place.
"""

import functools
import itertools
import math

import numpy as np


def inverse(order: np.ndarray) -> np.ndarray:
    """The place of every token, int32 `[tokens]`."""
    place = np.empty_like(order)
    place[order] = np.arange(order.size, dtype=order.dtype)
    return place


def boxes(grid_shape: tuple[int, int, int], box_shape: tuple[float, ...]) -> tuple[np.ndarray, int]:
    """Video tokens box by box: boxes in raster order, and tokens in raster order inside each.

    Args:
      grid_shape: frames, height and width in tokens; token (t, y, x) has index (t height + y) width + x.
      box_shape: `(frames,)`, slabs of time: tokens stay as they are and frames may be a fraction, the size of a box
        then being rounded down to whole tokens and the last box short; `(height, width)`, windows that span all frames;
        or `(frames, height, width)`. The latter two must divide the grid.

    Returns:
      The permutation, int32 `[tokens]`, and the number of tokens in a box.

    Raises:
      ValueError: a shape has a wrong length or value, or boxes do not divide the grid.
    """
    _check_grid(grid_shape)
    tokens = np.arange(math.prod(grid_shape), dtype=np.int32)
    if len(box_shape) == 1:
        size = int(box_shape[0] * grid_shape[1] * grid_shape[2])
        if size < 1:
            raise ValueError(f"box_shape must hold a token or more, got {box_shape=} for {grid_shape=}")
        return tokens, size
    full = (grid_shape[0], *box_shape) if len(box_shape) == 2 else tuple(box_shape)
    if len(full) != 3 or any(box < 1 or size % box for size, box in zip(grid_shape, full, strict=True)):
        raise ValueError(f"box_shape must be 1 to 3 sizes, of which 2 or 3 divide {grid_shape=}, got {box_shape=}")
    (frames, height, width) = (int(box) for box in full)
    split = tokens.reshape(
        grid_shape[0] // frames, frames, grid_shape[1] // height, height, grid_shape[2] // width, width
    )
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(-1), frames * height * width


@functools.cache
def space_filling_curve(grid_shape: tuple[int, int, int]) -> np.ndarray:
    """Video tokens along a generalised Hilbert curve ("Gilbert"), so that runs of tokens are compact lumps of the grid.

    The grid is cut into two to five boxes that follow one another, each the next one's neighbour, until they are lines.
    Consecutive tokens differ by at most 1 in every coordinate, and in one coordinate only where all sizes are even. The
    curve starts at token 0. Source: J. Cerveny, generalised Hilbert curves for rectangular domains of arbitrary size.

    Args:
      grid_shape: frames, height and width in tokens; token (t, y, x) has index (t height + y) width + x.

    Returns:
      The permutation, int32 `[tokens]`, read-only.
    """
    _check_grid(grid_shape)
    longest_first = sorted(range(3), key=lambda axis: (-grid_shape[axis], -axis))
    directions = np.eye(3, dtype=np.int64)
    lines: list[np.ndarray] = []
    _append_lines(directions[0] * 0, [grid_shape[axis] * directions[axis] for axis in longest_first], lines)
    order = np.ravel_multi_index(tuple(np.concatenate(lines).T), grid_shape).astype(np.int32)
    order.flags.writeable = False
    return order


def _append_lines(start: np.ndarray, edges: list[np.ndarray], lines: list[np.ndarray]) -> None:
    """Appends the curve through the box that three edges span at the token `start`, from there to the first one's end.

    All `[3]`, in tokens along frames, height and width; an edge has one entry that is not 0. Lines are `[tokens, 3]`.
    """
    sizes = [int(np.abs(edge).sum()) for edge in edges]
    if 0 in sizes:
        return
    longest = max(sizes)
    if longest == math.prod(sizes):
        step = np.sign(edges[sizes.index(longest)])
        lines.append(start + np.arange(longest)[:, None] * step)
        return
    (a, b, c), (da, db, dc) = edges, (np.sign(edge) for edge in edges)
    # Even first parts where there can be: no diagonal steps in them.
    halves = [size // 2 + (size // 2 % 2 if size > 2 else 0) for size in sizes]
    a1, b1, c1 = (half * np.sign(edge) for half, edge in zip(halves, edges, strict=True))
    a2, b2, c2 = a - a1, b - b1, c - c1
    end = a - da
    if 2 * sizes[0] > 3 * max(sizes[1:]):  # a is long: cut it alone
        parts = [(0 * a, a1, b, c), (a1, a2, b, c)]
    elif 3 * sizes[1] > 4 * sizes[2]:  # c is short: leave it whole
        parts = [(0 * a, b1, c, a1), (b1, a, b2, c), (end + b1 - db, -b1, c, -a2)]
    elif 3 * sizes[2] > 4 * sizes[1]:  # b is short
        parts = [(0 * a, c1, a1, b), (c1, a, b, c2), (end + c1 - dc, -c1, -a2, b)]
    else:
        parts = [
            (0 * a, b1, c1, a1),
            (b1, c, a1, b2),
            (b1 - db + c - dc, a, -b1, -c2),
            (end + b1 + c - dc, -c, -a2, b2),
            (end + b1 - db, -b1, c1, -a2),
        ]
    for offset, *edges_of_part in parts:
        _append_lines(start + offset, edges_of_part, lines)


def neighbouring_blocks(grid_shape: tuple[int, int, int], order: np.ndarray, block_size: int) -> np.ndarray:
    """Which blocks of the ordered tokens touch in the grid: hold tokens less than two apart along each axis.

    Args:
      grid_shape: frames, height and width in tokens.
      order: permutation of the grid's tokens, int32 `[tokens]`.
      block_size: tokens in a block.

    Returns:
      bool `[blocks, blocks]`, symmetric, with a true diagonal.
    """
    block = (inverse(order) // block_size).reshape(grid_shape)
    num_blocks = -(-order.size // block_size)
    touches = np.zeros((num_blocks, num_blocks), bool)
    cut = {-1: (slice(1, None), slice(None, -1)), 0: (slice(None),) * 2, 1: (slice(None, -1), slice(1, None))}
    for steps in itertools.product((-1, 0, 1), repeat=3):
        one, other = zip(*(cut[step] for step in steps), strict=True)
        touches[block[one].ravel(), block[other].ravel()] = True
    return touches


def _check_grid(grid_shape: tuple[int, int, int]) -> None:
    if len(grid_shape) != 3 or any(not isinstance(size, int) or size < 1 for size in grid_shape):
        raise ValueError(f"grid_shape must be three ints of at least 1, got {grid_shape=}")
