"""What the tests of the TPU kernels for choices made by every query share: named shapes and small sizes."""

import dataclasses

from pallas_kernels.config import PerQueryConfig
from pallas_kernels.tpu.per_query.memory import SPARE_ROWS
from tests.cases import Case

# Three tiles a step, several steps, the last of which is not full.
SMALL = PerQueryConfig(tile_size=8, slots_per_step=24, backward_tile_size=8, piece_rows=128, pieces_per_step=4)

# Query heads per key/value head: 1, 2, 3, 4, 7, 8. "odd_blocks" has three chunks of 128 rows in the forward pass, the
# last of them with three rows; "pieces" has one of three pieces.
CASES = (
    Case("packed", batch=2, queries=26, keys=50, heads=6, head_dim=64, block_size=16, top_k=4, sequences="mixed"),
    Case("lengths", queries=33, keys=50, heads=4, head_dim=128, block_size=32, dtype="bfloat16", sequences="lengths"),
    Case("odd_blocks", 1, 37, 50, heads=14, head_dim=96, block_size=24, top_k=1, is_causal=False, scale=0.13),
    Case("pieces", 1, 65, 40, heads=4, kv_heads=1, head_dim=64, block_size=16, top_k=1, is_causal=False),
    Case("wide", batch=1, queries=19, keys=60, head_dim=256, block_size=16, top_k=3),
    Case("wide_bfloat16", 1, 5, 60, heads=16, head_dim=256, block_size=48, top_k=2, dtype="bfloat16"),
)


# How strongly the first of two key/value heads is asked: its logits leave the range of the kernel without a maximum.
LOUD = 8


def with_chunks(num_rows, row_bytes):
    """Sizes for chunks of so many rows at most."""
    return dataclasses.replace(SMALL, chunk_bytes=(num_rows + SPARE_ROWS) * row_bytes)
