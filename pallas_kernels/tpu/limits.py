"""What the TPU kernels cannot do, asked before any of them is traced."""

import jax

from pallas_kernels.blocks import Blocks
from pallas_kernels.config import PerQueryConfig
from pallas_kernels.tpu.per_query import backward, forward, memory


def refuses_per_query(
    query: jax.Array, key: jax.Array, top_k: int, blocks: Blocks, config: PerQueryConfig
) -> str | None:
    """Why the kernels for choices made by every query cannot do a call, forward or backward; None if they can."""
    reason = memory.refuses(query, blocks)
    if reason is not None:
        return reason
    plans = (module.plan_chunk(query, key, top_k, blocks, config) for module in (forward, backward))
    return next((plan for plan in plans if isinstance(plan, str)), None)
