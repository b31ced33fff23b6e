"""Cases of the decode kernels: a few new tokens and a cache, with a choice at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn.decode import extend_moba_cache, init_moba_cache, moba_cached_attention
from tests import cases, near_ties, oracle

BATCH, KV_HEADS, NUM_BLOCKS = 3, 2, 11


@dataclasses.dataclass(frozen=True)
class Case:
    """A call; row 0 of the batch ends inside a block, row 1 is empty, row 2 is full and has fewer new tokens."""

    group: int
    num_queries: int
    block_size: int
    top_k: int
    head_dim: int = 128
    value_head_dim: int = 128
    dtype: str = "float32"

    def __str__(self):
        return "-".join(map(str, dataclasses.astuple(self)))


# Unions of up to eleven blocks: steps, splits and parts of blocks are several, the last of them uneven.
CASES = (
    Case(group=1, num_queries=1, block_size=16, top_k=5),
    Case(group=3, num_queries=4, block_size=32, top_k=3, value_head_dim=256),
    Case(group=8, num_queries=1, block_size=16, top_k=4, dtype="bfloat16"),
    Case(group=8, num_queries=4, block_size=16, top_k=2),
)
GROUPS = ((1, 1), (3, 4), (8, 2))  # query heads of a key/value head, new tokens


def draw(case):
    """The arguments of a kernel, and what it should give: float64 softmax over the keys that a mask leaves."""
    random = np.random.default_rng(case.group)
    heads, num_keys = KV_HEADS * case.group, NUM_BLOCKS * case.block_size
    query = random.standard_normal((BATCH, case.num_queries, heads, case.head_dim))
    key = random.standard_normal((BATCH, KV_HEADS, NUM_BLOCKS, case.block_size, case.head_dim))
    value = random.standard_normal((*key.shape[:4], case.value_head_dim))
    arrays = [array.astype(cases.as_dtype(case.dtype)) for array in (query, key, value)]
    length = np.array([num_keys * 5 // 8 + 3, 0, num_keys], np.int32)
    num_new = np.array([case.num_queries, 0, max(case.num_queries - 1, 1)], np.int32)

    token = np.arange(case.num_queries)
    stop = np.where(token < num_new[:, None], (length - num_new)[:, None] + token + 1, 0)  # [batch, queries]
    own = (stop - 1) // case.block_size
    indices = np.full((BATCH, heads, case.num_queries, case.top_k), -1, np.int32)
    for b, h, t in np.ndindex(indices.shape[:3]):
        if stop[b, t]:
            others = random.permutation(own[b, t])[: case.top_k - 1]
            indices[b, h, t, : 1 + others.size] = own[b, t], *others
    indices[0, 0] = indices[0, 0, :, ::-1]  # -1 may come first

    block = np.arange(num_keys) // case.block_size
    mask = (indices[..., None] == block).any(-2) & (np.arange(num_keys) < stop[:, None, :, None])
    rows = (array.reshape(BATCH, KV_HEADS, num_keys, -1).swapaxes(1, 2) for array in arrays[1:])
    expected = oracle.attention(arrays[0], *rows, mask, scale=0.3)
    arguments = tuple(map(jnp.asarray, arrays)), *map(jnp.asarray, (indices, length, num_new))
    return arguments, expected


def check_the_law(backend, group, num_queries):
    """The last tokens of rows of 53, 0 and 77 tokens, against the whole rows."""
    random = np.random.default_rng(group)
    length, num_new = np.array([53, 0, 77]), np.array([num_queries, 0, max(num_queries - 1, 1)])
    shapes = ((BATCH, length.max(), heads, 128) for heads in (KV_HEADS * group, KV_HEADS, KV_HEADS))
    query, key, value = (near_ties.eighths(random.standard_normal(shape)).astype(np.float32) for shape in shapes)
    place = np.maximum((length - num_new)[:, None], 0) + np.arange(num_queries)  # [batch, queries]
    place = np.minimum(place, length.max() - 1)
    options = {"block_size": 16, "top_k": 3}

    @jax.jit
    def call(query, key, value):
        cache = init_moba_cache(BATCH, 90, KV_HEADS, 128, block_size=16)
        cache = extend_moba_cache(cache, key, value, num_new=length)
        return moba_cached_attention(query, cache, top_k=3, num_new=num_new, implementation=backend)

    output = np.asarray(call(np.take_along_axis(query, place[..., None, None], 1), key, value))
    assert oracle.route(query, key, **options)[1].min() > 0, "rounding may change a choice: take another seed"
    expected = np.take_along_axis(oracle.moba(query, key, value, **options), place[..., None, None], 1)
    expected[np.arange(num_queries) >= num_new[:, None]] = 0
    cases.assert_close(output, expected, "float32")
