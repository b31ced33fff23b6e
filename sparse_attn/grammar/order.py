"""Order: permutations of tokens that bring related ones together, so that blocks of consecutive tokens are of a kind.

A permutation is int32 `[tokens]`: the original index of the token at each place, so that `array[:, order]` is the array
in the new order and `inverse(order)` gives every token's place.
"""

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
    if len(grid_shape) != 3 or any(not isinstance(size, int) or size < 1 for size in grid_shape):
        raise ValueError(f"grid_shape must be three ints of at least 1, got {grid_shape=}")
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
