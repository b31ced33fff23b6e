"""A look inside a choice: which query attends which block, how densely, and how evenly the blocks are used."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.selection import BlockSelection, LevelMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_ROWS = 512  # rows of a drawn map; more would fall below a pixel


def routing_entropy(selection: BlockSelection | LevelMap) -> jax.Array:
    """How evenly the chosen pairs fall on the key blocks: H = -sum_j p_j log2 p_j, with p_j block j's share of them.

    0 where all queries chose one block, log2(number of blocks) where all blocks are chosen equally often.

    Returns:
      float32 `[batch, heads]`, bits; 0 for a head that chose nothing.
    """
    chosen = selection.to_mask().sum(-2, dtype=jnp.float32)  # [batch, heads, blocks]
    share = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1)
    return -(share * jnp.log2(jnp.where(share > 0, share, 1))).sum(-1)


def draw_selection(selection: BlockSelection | LevelMap, *, batch_index: int = 0, max_heads: int = 4) -> "Figure":
    """Draws the map of every head (queries down, key blocks across), and bars of density and entropy over heads.

    A map is dark where a block is attended exactly and tinted where a `LevelMap` gives it another level. Needs
    matplotlib, which the extra [experiments] installs.

    Args:
      selection: the choice, of concrete arrays (not under jit).
      batch_index: row of the batch that is drawn.
      max_heads: maps drawn, from the first head on; the bars show every head.

    Returns:
      A matplotlib Figure; `figure.savefig(path)` keeps it.

    Raises:
      ValueError: batch_index is not a row of the batch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    levels = selection.to_mask() if isinstance(selection, BlockSelection) else selection.levels
    batch, num_heads, num_rows, num_blocks = levels.shape
    if not 0 <= batch_index < batch:
        raise ValueError(f"batch_index must be at least 0 and below {batch}, got batch_index={batch_index}")
    maps = np.asarray(levels[batch_index, :max_heads]).astype(int)
    maps = maps[:, :: -(-num_rows // _MAX_ROWS)]
    shades = np.array(["#ffffff", "#1f4e8c", "#e8a33d", "#efbf77", "#f5d9ae", "#faecd6"])
    kinds = np.unique(levels[batch_index])  # 0, 1, and whatever else the system has
    colours = ListedColormap(shades[np.minimum(np.searchsorted([0, 1, 2, 4, 8], range(kinds.max() + 1)), 5)])

    figure = Figure(figsize=(2.6 * len(maps) + 3.2, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(maps) + 1, width_ratios=[1.0] * len(maps) + [1.1], squeeze=False)[0]
    row_name = "query" if isinstance(selection, BlockSelection) or selection.query_block_size == 1 else "query block"
    for head, (axis, each) in enumerate(zip(axes, maps, strict=False)):
        axis.imshow(
            each,
            cmap=colours,
            vmin=0,
            vmax=max(kinds.max(), 1),
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, num_blocks - 0.5, num_rows - 0.5, -0.5),
        )
        axis.set(title=f"head {head}", xlabel="key block", ylabel=row_name if head == 0 else None)
    density, entropy = (np.asarray(array[batch_index]) for array in (selection.density(), routing_entropy(selection)))
    bars, heads = axes[-1], np.arange(num_heads)
    bars.bar(heads - 0.2, density, 0.4, color="#1f4e8c", label="density")
    largest = np.log2(max(num_blocks, 2))
    bars.bar(heads + 0.2, entropy / largest, 0.4, color="#e8a33d", label=f"entropy / {largest:.1f} bits")
    bars.set(title="over heads", xlabel="head", ylim=(0, 1.05), xticks=heads[:: -(-num_heads // 8)])
    bars.legend(frameon=False, fontsize=7)
    return figure
