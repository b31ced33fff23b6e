"""One call of every system, for tests of what all of them must do."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn.systems.adaspa import AdaSpa
from sparse_attn.systems.block_attention import BlockAttention
from sparse_attn.systems.block_bert import BlockBERT, shifts
from sparse_attn.systems.block_rank import BlockRank
from sparse_attn.systems.bsfa import BSFA
from sparse_attn.systems.combiner import Combiner
from sparse_attn.systems.dsa import DSA, Indexer
from sparse_attn.systems.flash_moba import FlashMoBA
from sparse_attn.systems.infllm_v2 import InfLLMv2
from sparse_attn.systems.moba import MoBA
from sparse_attn.systems.nsa import NSA
from sparse_attn.systems.orion_msp import OrionMSP
from sparse_attn.systems.pbs_attention import PBSAttention
from sparse_attn.systems.pisa import PISA
from sparse_attn.systems.prism import Prism
from sparse_attn.systems.proxy_attention import ProxyAttention
from sparse_attn.systems.psa import PSA
from sparse_attn.systems.rectified import RectifiedSpaAttn
from sparse_attn.systems.sale import SALE
from sparse_attn.systems.sla import SLA
from sparse_attn.systems.tidal_decode import TidalDecode
from sparse_attn.systems.vmoba import VMoBA
from sparse_attn.systems.xattention import XAttention

TOKENS = 48  # of the arrays that `every_system` is called with, a number that the grids below hold


def make_values(num_heads: int) -> dict[str, Any]:
    """The value of each system by the name of its module, of small sizes, for num_heads query heads."""
    tiles = {"query_block_size": 8, "key_block_size": 8}
    return {
        "adaspa": AdaSpa(block_size=8),
        "block_attention": BlockAttention(**tiles),
        "block_bert": BlockBERT(permutations=shifts((num_heads - num_heads // 2, num_heads // 2))),
        "block_rank": BlockRank(block_size=8),
        "bsfa": BSFA(**tiles),
        "combiner": Combiner(block_size=8),
        "dsa": DSA(top_k=8),
        "flash_moba": FlashMoBA(block_size=8, top_k=2),
        "infllm_v2": InfLLMv2(block_size=8, pool_size=4, pool_stride=2, local_blocks=1, top_k=3, dense_length=8),
        "moba": MoBA(block_size=8, top_k=2),
        "nsa": NSA(block_size=8, top_k=2, window_size=8),
        "orion_msp": OrionMSP(num_special=4, window=5),
        "pbs_attention": PBSAttention(block_size=8, segment_size=16, threshold=0.5),
        "pisa": PISA(density=0.4, block_size=8),
        "prism": Prism(high_size=4, low_size=6, block_size=8),
        "proxy_attention": ProxyAttention(num_proxies=1, stride=2, min_tokens=8, block_size=8),
        "psa": PSA(query_block_size=8, key_block_size=32, bounds=(0.5, 0.6, 0.9, 1.0)),
        "rectified": RectifiedSpaAttn(block_size=8, text_length=8, threshold=0.5),
        "sale": SALE(local_window=8, dense_length=8, **tiles),
        "sla": SLA(density=0.4, **tiles),
        "tidal_decode": TidalDecode(top_k=8),
        "vmoba": VMoBA(grid_shape=(3, 4, 4), box_shape=(1, 2, 2), threshold=0.5),
        "xattention": XAttention(stride=4, block_size=8, threshold=0.5),
    }


NAMES = tuple(make_values(num_heads=2))


def every_system(query: jax.Array, key: jax.Array) -> dict[str, Callable[..., jax.Array]]:
    """Each system as a function of query `[batch, TOKENS, heads, 8]`, key and value, whatever else it takes drawn."""
    batch, tokens, heads, head_dim = query.shape
    draw = functools.partial(jax.random.normal, jax.random.key(7))
    values = make_values(heads)
    arrays: dict[str, dict[str, Any]] = {
        "block_attention": {"segment_lengths": jnp.tile(jnp.array([[20, 9, 19]]), (batch, 1))},
        "block_rank": {"is_valid": jnp.ones((batch, tokens), bool)},
        "bsfa": {"thresholds": jnp.full((heads, tokens // 8), 0.1)},
        "dsa": {"indexer": Indexer(draw((batch, tokens, 2, 4)), draw((batch, tokens, 4)), draw((batch, tokens, 2)))},
        "flash_moba": {"kernel": 0.1 * draw((3, key.shape[2], head_dim))},
        "nsa": {"gates": draw((batch, tokens, heads, 3))},
        "psa": {"offsets": values["psa"].draw_offsets(jax.random.key(8), query, key)},
        "sla": {"projection": draw((head_dim, head_dim)), "bias": draw((head_dim,))},
    }

    def decode(query: jax.Array, key: jax.Array, value: jax.Array, **rows: Any) -> jax.Array:
        """One token, at a layer that selects."""
        return values["tidal_decode"](query[:, -1:], key, value, None, layer=2, **rows)[0]

    calls = {name: functools.partial(value, **arrays.get(name, {})) for name, value in values.items()}
    return calls | {"tidal_decode": decode}
