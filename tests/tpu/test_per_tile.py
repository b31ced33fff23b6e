"""The per-tile TPU kernels, interpreted on a CPU, against dense masks in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.blocks import Blocks
from pallas_kernels.tpu.per_tile.backward import attend_tiles_backward
from pallas_kernels.tpu.per_tile.forward import attend_tiles_forward
from pallas_kernels.tpu.per_tile.operands import DEFAULT, NOWHERE, TileConfig
from tests import cases

pytestmark = pytest.mark.timeout(120)


@dataclasses.dataclass(frozen=True)
class TileCase:
    """One call of the kernels.

    Attributes:
      list_length: room in the list of a query tile; lists have all lengths up to it, with gaps.
      permuted: whether each key/value head has its keys in an order of its own, with a few padding keys among them.
    """

    name: str
    queries: int
    keys: int
    query_block_size: int
    key_block_size: int
    list_length: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    dtype: str = "float32"
    permuted: bool = False
    config: TileConfig = DEFAULT

    def __str__(self) -> str:
        return self.name


# Query heads per key/value head: 1, 2, 3, 4, 7, 8. A list takes three steps or more, the last with one partner of two,
# but for "one_large_step". In "cut_tiles" tiles and blocks have three parts, the last one half empty. In "many_steps"
# the steps of a row fill three lines of 32, not quite, in all three kernels.
CASES = (
    TileCase("ragged_permuted", 28, 90, 16, 16, 5, 1, 8, 2, permuted=True, config=TileConfig(32, 32)),
    TileCase("cut_tiles", 90, 190, 80, 80, 3, heads=3, head_dim=96, config=TileConfig(32, 64)),
    TileCase("bfloat16", 70, 130, 32, 24, 5, heads=7, head_dim=128, dtype="bfloat16", config=TileConfig(64, 64)),
    TileCase("one_large_step", 100, 102, 64, 64, 2, batch=2, head_dim=256),
    TileCase("many_steps", 190, 390, 16, 16, 13, heads=1, config=TileConfig(16, 16)),
    TileCase("group_of_eight", 28, 90, 16, 16, 5, heads=8, config=TileConfig(32, 32)),
)


@functools.cache
def make_inputs(case):
    """Arrays by the names of the kernels' arguments, with gradients of both outputs."""
    random = np.random.default_rng(0)
    query_shape = (case.batch, case.queries, case.heads, case.head_dim)
    key_shape = (case.batch, case.keys, case.kv_heads, case.head_dim)
    arrays = {name: random.standard_normal(query_shape) for name in ("query", "d_output")}
    arrays |= {name: random.standard_normal(key_shape) for name in ("key", "value")}
    arrays = {name: array.astype(cases.as_dtype(case.dtype)) for name, array in arrays.items()}
    arrays["d_log_sum_exp"] = random.standard_normal(query_shape[:3]).astype(np.float32)

    # Causal, aligned at the end, some queries with a start of their own, and the first ones with nothing to see.
    stop = np.maximum(np.arange(case.queries) + case.keys - case.queries - 5, 0)
    start = np.where(random.random((case.batch, case.queries)) < 0.3, stop // 2, 0)
    arrays["key_start"], arrays["key_stop"] = (
        start.astype(np.int32),
        np.broadcast_to(stop, start.shape).astype(np.int32),
    )
    position = np.arange(case.keys, dtype=np.int32)
    if case.permuted:
        places = np.where(position < 5, NOWHERE, position)
        position = np.broadcast_to(places[:, None], key_shape[:3])
        position = random.permuted(position, axis=1)
    else:
        position = np.broadcast_to(position, key_shape[:2])
    arrays["key_position"] = position

    tiles, num_blocks = -(-case.queries // case.query_block_size), -(-case.keys // case.key_block_size)
    ids = np.broadcast_to(np.arange(num_blocks), (case.batch, case.heads, tiles, num_blocks))
    ids = random.permuted(ids, axis=-1)[..., : case.list_length]
    lengths = random.integers(0, case.list_length + 1, (case.batch, case.heads, tiles, 1))
    lengths[0, 0, -1] = case.list_length
    ids = random.permuted(np.where(np.arange(ids.shape[-1]) < lengths, ids, -1), axis=-1)
    arrays["blocks"] = ids.astype(np.int32)
    return arrays


def make_mask(case, arrays):
    """Which query attends which key: bool `[batch, heads, queries, keys]`."""
    tile = np.arange(case.queries) // case.query_block_size
    block = np.arange(case.keys) // case.key_block_size
    is_chosen = (arrays["blocks"][:, :, tile, :, None] == block).any(-2)
    position = arrays["key_position"]
    position = np.broadcast_to(position[..., None] if position.ndim == 2 else position, arrays["key"].shape[:3])
    position = position.repeat(case.heads // case.kv_heads, axis=2).transpose(0, 2, 1)[:, :, None]
    start, stop = (arrays[name][:, None, :, None] for name in ("key_start", "key_stop"))
    return is_chosen & (start <= position) & (position < stop)


def dense(case, arrays, scale):
    """Output, log-sum-exp, and gradients of query, key and value, in float64 with dense masks."""
    mask = make_mask(case, arrays)
    group = case.heads // case.kv_heads
    query, key, value, d_output = (arrays[name].astype(np.float64) for name in ("query", "key", "value", "d_output"))
    key, value = key.repeat(group, axis=2), value.repeat(group, axis=2)
    logits = np.where(mask, scale * np.einsum("bqhd,bkhd->bhqk", query, key), -np.inf)
    with np.errstate(divide="ignore"):
        log_sum_exp = np.log(np.where(mask, np.exp(logits), 0).sum(-1))  # [batch, heads, queries]
    probability = np.where(mask, np.exp(logits - np.maximum(log_sum_exp, -1e9)[..., None]), 0)
    output = np.einsum("bhqk,bkhd->bqhd", probability, value)
    d_probability = np.einsum("bqhd,bkhd->bhqk", d_output, value)
    delta = (probability * d_probability).sum(-1) - arrays["d_log_sum_exp"].transpose(0, 2, 1)
    d_logits = scale * probability * (d_probability - delta[..., None])

    def sum_group(gradient):  # [batch, keys, heads, head_dim] -> [batch, keys, kv_heads, head_dim]
        return gradient.reshape(*gradient.shape[:2], case.kv_heads, group, -1).sum(3)

    d_query = np.einsum("bhqk,bkhd->bqhd", d_logits, key)
    d_key = sum_group(np.einsum("bhqk,bqhd->bkhd", d_logits, query))
    d_value = sum_group(np.einsum("bhqk,bqhd->bkhd", probability, d_output))
    return output, log_sum_exp.transpose(0, 2, 1), d_query, d_key, d_value


def operands(case, arrays):
    """What `attend_tiles_forward` takes: arrays, lists, geometry, queries of a tile."""
    start, stop, position = (jnp.asarray(arrays[name]) for name in ("key_start", "key_stop", "key_position"))
    position = position[..., None] if position.ndim == 2 else position
    sizes = {"block_size": case.key_block_size, "num_keys": position.shape[1], "is_packed": False}
    blocks = Blocks(start, stop, position, start, start, start, start, **sizes)
    return tuple(arrays[name] for name in ("query", "key", "value")), arrays["blocks"], blocks, case.query_block_size


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_those_of_dense_masks(case, interpret):
    arrays, scale = make_inputs(case), 1.3 * case.head_dim**-0.5
    options = {"scale": scale, "config": case.config, "interpret": interpret}

    @jax.jit
    def call(arrays):
        cotangents = arrays["d_output"], arrays["d_log_sum_exp"]
        results = attend_tiles_forward(*operands(case, arrays), **options)
        return *results, *attend_tiles_backward(*operands(case, arrays), results, cotangents, **options)

    actual = call(arrays)
    expected = dense(case, arrays, scale)
    is_empty = np.isneginf(expected[1])
    assert is_empty.any()
    np.testing.assert_array_equal(np.isneginf(actual[1]), is_empty)
    cases.assert_close(np.asarray(actual[1])[~is_empty], expected[1][~is_empty], case.dtype)
    for index in (0, 2, 3, 4):
        assert actual[index].dtype == cases.as_dtype(case.dtype)
        cases.assert_close(actual[index], expected[index], case.dtype)


def test_large_logits_of_either_sign_are_exact(interpret):
    """The running maximum is a true one: logits in the thousands neither overflow nor vanish."""
    case = TileCase("large", 16, 64, 16, 16, 4, heads=1, config=TileConfig(16, 16))
    arrays = make_inputs(case) | {"blocks": np.array([[[[0, 1, 2, 3]]]], np.int32)}
    for scale in (100.0, -100.0):
        sizes = {"config": case.config, "interpret": interpret}
        output, log_sum_exp = attend_tiles_forward(*operands(case, arrays), scale=scale, **sizes)
        mask = make_mask(case, arrays)[0, 0]
        logits = scale * arrays["query"][0, :, 0].astype(np.float64) @ arrays["key"][0, :, 0].T.astype(np.float64)
        largest = np.where(mask, logits, -np.inf).max(-1)
        assert np.abs(largest).max() > 1000
        winner = np.where(mask, logits, -np.inf).argmax(-1)
        clear = np.sort(np.where(mask, logits, -np.inf), axis=-1)[:, -2] < largest - 50  # the others weigh nothing
        cases.assert_close(np.asarray(output)[0, clear, 0], arrays["value"][0, winner[clear], 0], case.dtype)
        np.testing.assert_allclose(np.asarray(log_sum_exp)[0, clear, 0], largest[clear], rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("float16", {"dtype": "float16"}),
        ("query_block_size=8", {"query_block_size": 8}),
        ("key_block_size=1", {"key_block_size": 1}),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(words, change):
    case = dataclasses.replace(TileCase("refused", 32, 32, 16, 16, 2), **change)
    with pytest.raises(NotImplementedError, match=words):
        attend_tiles_forward(*operands(case, make_inputs(case)), scale=1.0)
