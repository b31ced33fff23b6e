"""The GPU kernels are what Triton can take: lowered for CUDA, which needs neither a GPU nor its compiler."""

import jax
import pytest

from tests.backends import needs_triton
from tests.gpu.compile import attend_variants, decode_variant, h100, route_variant

pytestmark = [pytest.mark.timeout(120), needs_triton]

KERNELS = (
    *("moba_block_means", "moba_route", "attend_tiles", "merge_partials"),
    *("attend_d_query", "add_up_d_query", "attend_d_key_value", "attend_few"),
)


@pytest.mark.parametrize("sizes", [("bfloat16", 128, 128, 8), ("float32", 80, 100, 8)], ids=str)
def test_every_kernel_is_lowered_for_cuda(sizes):
    text = ""
    for variant in (route_variant(*sizes), *attend_variants(*sizes), decode_variant(*sizes, group=8, queries=4)):
        with h100():
            lowered = jax.jit(variant.function).trace(*variant.shapes).lower(lowering_platforms=("cuda",))
        text += lowered.as_text()
    for name in KERNELS:
        assert name in text
