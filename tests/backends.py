"""Every backend, as the tests take it; the sizes are so small that loops loop."""

import jax
import pytest

from pallas_kernels.config import TritonConfig
from pallas_kernels.gpu import tiles
from sparse_attn.attend import per_query, per_tile, route
from sparse_attn.attend.backends import TpuKernels, TritonKernels, Xla

# Chunks of a few queries, three or more of them; steps of a tile or two; one head at a time.
SMALL_STEPS = Xla(
    route.Sizes(rows_per_chunk=5, blocks_per_step=3, elements_per_step=1),
    per_query.Sizes(tile_sizes=(4, 2), pairs_per_step=8, logits_per_step=64, rows_per_chunk=8, elements_per_step=1),
    per_tile.Sizes(logits_per_step=5 * 64, elements_per_step=1),
)
HAS_TRITON = tiles.plgpu is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="this JAX has no Triton backend of Pallas")
TRITON = TritonConfig(
    tile_size=16, key_size=16, backward_tile_size=16, merge_rows=16, route_queries=16, route_blocks=16, means_keys=2
)


def tpu_kernels():
    """The TPU kernels, interpreted as strictly as can be; made late, for it loads Pallas."""
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.tpu.routing import RoutingConfig
    from tests.tpu.per_query import SMALL

    interpret = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
    return TpuKernels(SMALL, RoutingConfig(key_rows=32, queries=128, blocks=32), interpret)


BACKENDS = {
    "reference": lambda: "reference",
    "xla": lambda: "xla",
    **({"triton": lambda: TritonKernels(TRITON, interpret=True)} if HAS_TRITON else {}),
    "tpu": tpu_kernels,
}
if jax.default_backend() == "gpu":
    BACKENDS["pallas"] = lambda: "pallas"
PLAIN = ("reference", "xla")  # those that are no kernels

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_plain_backend = pytest.mark.parametrize("implementation", PLAIN)
