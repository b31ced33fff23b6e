"""One call of every system, for tests of what all of them must do."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_attn.systems import (
    adaspa,
    block_attention,
    block_bert,
    block_rank,
    bsfa,
    combiner,
    dsa,
    flash_moba,
    infllm_v2,
    moba,
    nsa,
    orion_msp,
    pbs_attention,
    pisa,
    prism,
    proxy_attention,
    psa,
    rectified,
    sale,
    sla,
    tidal_decode,
    vmoba,
    xattention,
)

NAMES = (
    "adaspa", "block_attention", "block_bert", "block_rank", "bsfa", "combiner", "dsa", "flash_moba", "infllm_v2",
    "moba", "nsa", "orion_msp", "pbs_attention", "pisa", "prism", "proxy_attention", "psa", "rectified", "sale", "sla",
    "tidal_decode", "vmoba", "xattention",
)  # fmt: skip
TOKENS = 48  # of `attend`'s arrays, a number that the grids below hold


def every_system(query: jax.Array, key: jax.Array) -> dict[str, Callable[..., jax.Array]]:
    """Each system as a function of query `[batch, TOKENS, heads, 8]`, key and value, whatever else it takes drawn."""
    batch, tokens, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    draw = functools.partial(jax.random.normal, jax.random.key(7))
    bound = functools.partial
    indexer = dsa.Indexer(draw((batch, tokens, 2, 4)), draw((batch, tokens, 4)), draw((batch, tokens, 2)))
    offsets = psa.draw_offsets(jax.random.key(8), query, key, query_block_size=8, key_block_size=32)
    return {
        "adaspa": lambda q, k, v: adaspa.attention(q, k, v, block_size=8),
        "block_attention": lambda q, k, v: block_attention.attention(
            q, k, v, jnp.tile(jnp.array([[20, 9, 19]]), (batch, 1)), query_block_size=8, key_block_size=8
        ),
        "block_bert": bound(block_bert.attention, permutations=block_bert.shifts((heads - heads // 2, heads // 2))),
        "block_rank": lambda q, k, v: block_rank.attention(q, k, v, jnp.ones((batch, tokens), bool), block_size=8),
        "bsfa": lambda q, k, v: bsfa.attention(
            q, k, v, jnp.full((heads, 6), 0.1), query_block_size=8, key_block_size=8
        ),
        "combiner": bound(combiner.attention, block_size=8),
        "dsa": lambda q, k, v: dsa.attention(q, k, v, indexer, top_k=8),
        "flash_moba": lambda q, k, v: flash_moba.attention(
            q, k, v, 0.1 * draw((3, kv_heads, head_dim)), block_size=8, top_k=2
        ),
        "infllm_v2": bound(
            infllm_v2.attention, block_size=8, pool_size=4, pool_stride=2, local_blocks=1, top_k=3, dense_length=8
        ),
        "moba": bound(moba.attention, block_size=8, top_k=2),
        "nsa": lambda q, k, v: nsa.attention(
            q, k, v, draw((batch, tokens, heads, 3)), block_size=8, top_k=2, window_size=8
        ),
        "orion_msp": bound(orion_msp.attention, num_special=4, window=5),
        "pbs_attention": bound(pbs_attention.attention, block_size=8, segment_size=16, threshold=0.5),
        "pisa": bound(pisa.attention, density=0.4, block_size=8),
        "prism": bound(prism.attention, high_size=4, low_size=6, block_size=8),
        "proxy_attention": bound(proxy_attention.attention, num_proxies=1, stride=2, min_tokens=8, block_size=8),
        "psa": lambda q, k, v: psa.attention(
            q, k, v, offsets, query_block_size=8, key_block_size=32, bounds=(0.5, 0.6, 0.9, 1.0)
        ),
        "rectified": bound(rectified.attention, block_size=8, text_length=8, threshold=0.5),
        "sale": bound(sale.attention, local_window=8, dense_length=8, query_block_size=8, key_block_size=8),
        "sla": lambda q, k, v: sla.attention(
            q, k, v, draw((head_dim, head_dim)), draw((head_dim,)), query_block_size=8, key_block_size=8, density=0.4
        ),
        "tidal_decode": lambda q, k, v: tidal_decode.attention(q[:, -1:], k, v, None, layer=2, top_k=8)[0],
        "vmoba": bound(vmoba.attention, grid_shape=(3, 4, 4), box_shape=(1, 2, 2), threshold=0.5),
        "xattention": bound(xattention.attention, stride=4, block_size=8, threshold=0.5),
    }
