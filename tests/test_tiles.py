"""Attention over tiles, tokens and stand-ins against one dense NumPy softmax in float64, values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.blocks import NOWHERE
from sparse_attn.attend.partial import merge
from sparse_attn.attend.per_key import attend_tokens
from sparse_attn.grammar import rest
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import visible_tiles, whole_rows
from sparse_attn.selection import LevelMap
from sparse_attn.systems.xattention import XAttention
from tests.cases import assert_close

# name: (batch, queries, keys, heads, kv_heads, head_dim, query_block_size, key_block_size, is_causal)
SHAPES = {
    "aligned": (2, 32, 32, 2, 2, 8, 8, 4, True),
    "ragged": (1, 37, 45, 4, 2, 5, 8, 16, True),
    "all_see_all": (2, 21, 30, 3, 1, 4, 16, 8, False),
    "more_queries": (1, 30, 13, 2, 1, 4, 8, 4, True),
    "token_queries": (1, 20, 20, 2, 2, 4, 1, 4, True),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(shape, seed=0):
    """Arrays, a random map of levels 0, 1, 2, and the geometry."""
    batch, queries, keys, heads, kv_heads, head_dim, query_block, key_block, is_causal = shape
    random = np.random.default_rng(seed)
    query = random.standard_normal((batch, queries, heads, head_dim)).astype(np.float32)
    key, value = random.standard_normal((2, batch, keys, kv_heads, head_dim)).astype(np.float32)
    levels = random.integers(0, 3, (batch, heads, -(-queries // query_block), -(-keys // key_block))).astype(np.int8)
    blocks = whole_rows(query, key, block_size=key_block, is_causal=is_causal)
    return query, key, value, LevelMap(levels, query_block, key_block), blocks


def token_mask(levels, blocks, level, queries, keys, heads):
    """bool [batch, heads, queries, keys] by definition."""
    start, stop, position = (np.asarray(array) for array in (blocks.start, blocks.stop, blocks.key_position()))
    chosen = (np.asarray(levels.levels) == level).repeat(levels.query_block_size, 2).repeat(levels.key_block_size, 3)
    position = position.swapaxes(1, 2)[:, :, None].repeat(heads // position.shape[2], 1)  # [batch, heads, 1, keys]
    seen = (start[:, None, :, None] <= position) & (position < stop[:, None, :, None])
    return chosen[:, :, :queries, :keys] & seen


def dense(query, key, value, mask, scale, log_weight=0.0):
    """Output [batch, queries, heads, d] and log-sum-exp [batch, queries, heads], float64."""
    group = query.shape[2] // key.shape[2]
    key, value = (np.asarray(x, np.float64).repeat(group, 2) for x in (key, value))
    logits = scale * np.einsum("bthd,bshd->bhts", np.asarray(query, np.float64), key) + log_weight
    logits = np.where(mask, logits, -np.inf)
    largest = np.where(mask.any(-1), logits.max(-1), 0)
    weight = np.exp(logits - largest[..., None])
    total = weight.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        output = np.einsum("bhts,bshd->bthd", np.nan_to_num(weight / total[..., None]), value)
        return output, (largest + np.log(total)).swapaxes(1, 2)


@every_shape
def test_tiles_equal_a_dense_softmax(shape, strict_ranks):
    query, key, value, levels, blocks = draw(shape)
    log_weight = np.random.default_rng(1).standard_normal(key.shape[:3]).astype(np.float32)
    partial = jax.jit(lambda *x: attend_levels(*x[:5], scale=0.7, level=2, key_log_weight=x[5]))(
        query, key, value, levels, blocks, log_weight
    )
    mask = token_mask(levels, blocks, 2, query.shape[1], key.shape[1], query.shape[2])
    bias = log_weight.swapaxes(1, 2)[:, :, None].repeat(query.shape[2] // key.shape[2], 1)
    output, log_sum_exp = dense(query, key, value, mask, 0.7, bias)
    assert_close(partial.output(), output, "float32")
    np.testing.assert_array_equal(np.isneginf(partial.log_sum_exp()), np.isneginf(log_sum_exp))
    assert_close(np.nan_to_num(partial.log_sum_exp(), neginf=0), np.nan_to_num(log_sum_exp, neginf=0), "float32")


@every_shape
def test_gradients_equal_those_of_a_dense_softmax(shape):
    query, key, value, levels, blocks = draw(shape)
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    mask = token_mask(levels, blocks, 1, query.shape[1], key.shape[1], heads)
    random = np.random.default_rng(2)
    d_output = random.standard_normal(query.shape)
    d_log_sum_exp = random.standard_normal(query.shape[:3])
    has_keys = mask.any(-1).swapaxes(1, 2)

    def loss(output, log_sum_exp):
        return (output * d_output).sum() + (jnp.where(has_keys, log_sum_exp, 0) * d_log_sum_exp).sum()

    def sparse(query, key, value):
        partial = attend_levels(query, key, value, levels, blocks, scale=0.5)
        return loss(partial.output(), partial.log_sum_exp())

    def reference(query, key, value):  # float64, differentiated by JAX: nothing of the sparse path in it
        key, value = (jnp.repeat(x, group, 2) for x in (key, value))
        logits = jnp.where(mask, 0.5 * jnp.einsum("bthd,bshd->bhts", query, key), -1e30)
        weight = jnp.where(mask, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
        total = jnp.where(has_keys.swapaxes(1, 2), weight.sum(-1), 1)
        log_sum_exp = (jnp.log(total) + logits.max(-1)).swapaxes(1, 2)
        return loss(jnp.einsum("bhts,bshd->bthd", weight / total[..., None], value), log_sum_exp)

    actual = jax.jit(jax.grad(sparse, (0, 1, 2)))(query, key, value)
    with jax.enable_x64(True):
        expected = jax.grad(reference, (0, 1, 2))(*(jnp.asarray(x, jnp.float64) for x in (query, key, value)))
        expected = [np.asarray(x) for x in expected]
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, "float32")


def test_permuted_keys_stay_causal_and_padding_unseen():
    query, key, value, levels, blocks = draw((1, 24, 24, 2, 2, 4, 8, 8, True))
    order = np.random.default_rng(3).permutation(24)
    position = np.where(order < 20, order, NOWHERE)[None, :, None].astype(np.int32)
    blocks = dataclasses.replace(blocks, position=jnp.asarray(position))
    everything = LevelMap(np.ones_like(levels.levels), 8, 8)
    hidden = np.where(position[..., None] == NOWHERE, np.float32(1e30), key[:, order])
    partial = attend_levels(query, hidden, value[:, order], everything, blocks, scale=1.0)
    mask = np.tril(np.ones((24, 24), bool)) & (np.arange(24) < 20)
    assert_close(partial.output(), dense(query, key, value, mask[None, None], 1.0)[0], "float32")


def test_merging_levels_equals_one_softmax_over_them():
    query, key, value, levels, blocks = draw(SHAPES["ragged"])
    partials = [attend_levels(query, key, value, levels, blocks, scale=1.0, level=n) for n in (1, 2)]
    masks = [token_mask(levels, blocks, n, query.shape[1], key.shape[1], query.shape[2]) for n in (1, 2)]
    output, _ = dense(query, key, value, masks[0] | masks[1], 1.0)
    assert_close(merge(*partials).output(), output, "float32")


@pytest.mark.parametrize("lists", [4, 2, 1])
def test_tokens_equal_a_dense_softmax(lists):
    random = np.random.default_rng(4)
    query = random.standard_normal((2, 19, 4, 4)).astype(np.float32)
    key, value = random.standard_normal((2, 2, 23, 2, 4)).astype(np.float32)
    indices = random.permuted(np.broadcast_to(np.arange(23), (2, lists, 19, 23)), axis=-1)[..., :5]
    indices = np.where(random.random(indices.shape) < 0.3, -1, indices).astype(np.int32)
    mask = (indices[..., None] == np.arange(23)).any(-2).repeat(4 // lists, 1)
    partial = jax.jit(lambda *x: attend_tokens(*x, scale=0.5))(query, key, value, indices)
    assert_close(partial.output(), dense(query, key, value, mask, 0.5)[0], "float32")


def test_stand_ins_equal_a_dense_softmax_and_differentiate():
    random = np.random.default_rng(5)
    query = random.standard_normal((2, 19, 4, 4)).astype(np.float32)
    key, value = random.standard_normal((2, 2, 7, 2, 4)).astype(np.float32)
    log_count = np.log(random.integers(1, 9, 7)).astype(np.float32)
    is_used = random.random((2, 4, 3, 7)) < 0.6

    def attend(query, key, value):
        return rest.pooled(query, key, value, log_count, is_used, query_block_size=8, scale=0.5)

    mask = is_used.repeat(8, 2)[:, :, :19]
    expected, _ = dense(query, key, value, mask, 0.5, log_count)
    assert_close(jax.jit(attend)(query, key, value).output(), expected, "float32")
    with jax.enable_x64(True):
        check_grads(
            lambda *x: attend(*x).output(), [jnp.asarray(x, jnp.float64) for x in (query, key, value)], 1, ["rev"]
        )


def test_visible_tiles_never_miss_a_pair():
    blocks = whole_rows(np.zeros((1, 13, 1, 1)), np.zeros((1, 29, 1, 1)), block_size=8, is_causal=True)
    mask = np.arange(29)[None, :] <= np.arange(13)[:, None] + 16
    expected = np.zeros((4, 4), bool)
    for i, j in np.ndindex(4, 4):
        expected[i, j] = mask[4 * i : 4 * i + 4, 8 * j : 8 * j + 8].any()
    np.testing.assert_array_equal(visible_tiles(blocks, 4)[0, 0], expected)


@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(1024, 2, 1), (1152, 4, 2), (1153, 3, 1), (2049, 7, 1)])
def test_grouped_heads_at_real_lengths_equal_dense_attention(tokens, heads, kv_heads):
    """Every block is kept at threshold 1, so the right value is dense attention, in outputs and gradients."""
    random = np.random.default_rng(6)
    query, key, value = (
        random.standard_normal((1, tokens, n, 16)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )

    def output_and_gradients(attend):
        output, pull_back = jax.vjp(attend, query, key, value)
        return output, pull_back(jnp.sin(output))

    actual = jax.jit(lambda: output_and_gradients(lambda *x: XAttention(threshold=1.0)(*x)))()
    expected = jax.jit(lambda: output_and_gradients(lambda *x: jax.nn.dot_product_attention(*x, is_causal=True)))()
    jax.tree.map(lambda a, e: assert_close(a, e, "float32"), actual, expected)
