"""Generation: greedy tokens by the Transformer's formula in NumPy, sampling by its definition, one compiled step."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_attn import nn
from sparse_attn.nn import generate
from tests.test_nn import weights_of
from tests.test_transformer import CONFIG, transformer_formula

pytestmark = pytest.mark.usefixtures("strict_ranks")
SMALL = dataclasses.replace(CONFIG, num_layers=2)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 0, 3, 3, 12]]
NEW, CHUNK, LONGEST = 9, 4, 23  # tokens to generate, of a chunk, and of a cache
OPTIONS = {"max_new_tokens": NEW, "prefill_chunk": CHUNK, "max_length": LONGEST}


@functools.cache
def make(**options):
    return nn.Transformer(dataclasses.replace(SMALL, **options), rngs=nnx.Rngs(0))


def test_greedy_generation_takes_the_largest_logit_of_a_full_pass():
    model = make()
    found = model.generate(PROMPTS, **OPTIONS)
    assert found.tokens.dtype == np.int32
    np.testing.assert_array_equal(found.num_generated, NEW)
    for prompt, new in zip(PROMPTS, found.tokens, strict=True):
        tokens = np.array([[*prompt, *new]])
        logits, _ = transformer_formula(weights_of(model), SMALL, tokens, None)
        logits = logits[0, len(prompt) - 1 : -1]
        second, first = np.sort(logits)[:, -2:].T
        assert (first - second).min() > 1e-4, "rounding may change a token: take another prompt"
        np.testing.assert_array_equal(logits.argmax(-1), new)


def test_padded_arrays_lists_and_stacked_layers_generate_the_same_with_two_compilations_for_all():
    with mock.patch.object(nn.Transformer, "extend", autospec=True, side_effect=nn.Transformer.extend) as traced:
        generate._advance.clear_cache()
        expected = make().generate(PROMPTS, **OPTIONS).tokens
        assert traced.call_count == 2  # for a chunk and for a token
        padded = np.full((2, 13), -7)
        for row, prompt in zip(padded, PROMPTS, strict=True):
            row[: len(prompt)] = prompt
        again = make().generate(padded, lengths=[len(prompt) for prompt in PROMPTS], **OPTIONS).tokens
        np.testing.assert_array_equal(again, expected)
        np.testing.assert_array_equal(make(scan_layers=True).generate(PROMPTS, **OPTIONS).tokens, expected)
        for prompts in ([[5], [6, 7]], np.ones((2, 15), int)):
            make().generate(prompts, **OPTIONS)
        assert traced.call_count == 2


def test_stop_tokens_end_their_row_and_the_stream_ends_with_the_last():
    whole = make().generate(PROMPTS, **OPTIONS).tokens
    first, second = (int(row[3]) for row in whole)
    stops = [row.tolist().index(next(token for token in row if token in (first, second))) + 1 for row in whole]
    assert max(stops) < NEW
    found = make().generate(PROMPTS, stop_tokens=(first, second), **OPTIONS)
    np.testing.assert_array_equal(found.num_generated, stops)
    for row, expected, stop in zip(found.tokens, whole, stops, strict=True):
        np.testing.assert_array_equal(row[:stop], expected[:stop])
        np.testing.assert_array_equal(row[stop:], -1)
    steps = list(make().stream(PROMPTS, stop_tokens=(first, second), **OPTIONS))
    assert len(steps) == max(stops)
    np.testing.assert_array_equal(np.stack(steps, 1), found.tokens[:, : max(stops)])


def test_the_key_decides_what_is_sampled():
    options = OPTIONS | {"prefill_chunk": 1, "sampling": nn.Sampling(temperature=1.0, top_p=0.9)}
    first, again, other = (make().generate(PROMPTS, key=jax.random.key(i), **options).tokens for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert first.min() >= 0
    assert first.max() < SMALL.vocab_size


def keep(logits, temperature, top_k, top_p):
    """Logits over temperature, the largest 0, -inf where not to be drawn, by loops over sorted tokens."""
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    for row in logits:
        order = sorted(range(len(row)), key=lambda token, row=row: -row[token])
        if top_k is not None:
            row[order[top_k:]] = -np.inf
        probability, total, kept = np.exp(row - row.max()), 0.0, []
        for token in order:
            if total < top_p * probability.sum() or top_p == 1:
                kept.append(token)
            total += probability[token]
        row[[token for token in order if token not in kept]] = -np.inf
    return logits


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, 1.0), (1.0, 3, 1.0), (2.0, None, 0.6), (0.5, 4, 0.8), (1.0, 50, 1e-6)],
)
def test_filtered_logits_are_those_of_the_definition(temperature, top_k, top_p):
    logits = np.random.default_rng(0).standard_normal((5, 12)) * 2
    sampling = nn.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    expected = keep(logits, temperature, top_k, top_p)
    found = np.asarray(sampling.filter(jnp.asarray(logits, jnp.float32)))
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    sampling, logits = nn.Sampling(temperature=2.0, top_k=3), jnp.array([0.0, 3.0, 1.0, 2.0])
    drawn = sampling.draw(jnp.tile(logits[None], (20_000, 1)), jax.random.key(0))
    likely = np.exp([-np.inf, 1.5, 0.5, 1.0]) / np.exp([1.5, 0.5, 1.0]).sum()
    deviation = np.sqrt(likely * (1 - likely) / drawn.size)
    assert (np.abs(np.bincount(drawn, minlength=4) / drawn.size - likely) <= 4 * deviation).all()


@pytest.mark.parametrize("options", [{"temperature": 1e-38}, {"temperature": 3.0, "top_k": 1}, {"top_p": 0.5}])
def test_cold_sampling_and_a_single_candidate_are_greedy(options):
    logits = np.random.default_rng(1).permuted(np.tile(np.arange(20.0, dtype=np.float32), (50, 1)), axis=1)
    drawn = nn.Sampling(**options).draw(jnp.asarray(logits), jax.random.key(0))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_a_step_copies_no_cache():
    model = make(scan_layers=True).unstacked()
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: model.init_cache(2, 2**15))
    carried = jax.ShapeDtypeStruct((2, SMALL.hidden_size), jnp.float32), cache
    tokens, num_new = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 1), (2,)))
    arguments = (state, None, np.int32(0), carried, tokens, num_new)
    program = generate._advance.lower(*arguments, graph=graph, sampling=nn.Sampling()).compile()
    key = max((layer.key for layer in cache), key=lambda array: array.size)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes > 2 * 4 * key.size
    assert memory.temp_size_in_bytes < 4 * key.size / 4
    for shape, operation in re.findall(r"= \w+\[([\d,]+)\]\S* (\w[\w-]*)\(", program.as_text()):
        if operation in ("copy", "pad", "transpose", "concatenate", "gather", "select"):
            assert math.prod(map(int, shape.split(","))) != key.size, (operation, shape)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prompts", {"prompts": np.zeros((2, 3))}),
        ("prompts", {"prompts": np.zeros(3, int)}),
        ("prompts", {"prompts": []}),
        ("prompts", {"prompts": [[1.5]]}),
        ("prompts", {"prompts": [[1, 13]]}),
        ("prompts", {"prompts": [[1, -1]]}),
        ("lengths", {"lengths": [3, 11]}),
        ("lengths", {"prompts": [[1], []]}),
        ("lengths", {"prompts": np.zeros((2, 3), int), "lengths": [4, 3]}),
        ("lengths", {"prompts": np.zeros((2, 3), int), "lengths": [3]}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("prefill_chunk", {"prefill_chunk": 0}),
        ("max_length", {"max_length": len(PROMPTS[1]) + NEW - 2}),
        ("key", {"sampling": nn.Sampling(temperature=1.0)}),
    ],
)
def test_bad_arguments_are_named_before_anything_runs_S10(name, change):
    with pytest.raises(ValueError, match=name):
        make().stream(**({"prompts": PROMPTS} | OPTIONS | change))


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("temperature", math.inf), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1)]
)
def test_bad_sampling_is_named_S10(name, value):
    with pytest.raises(ValueError, match=name):
        nn.Sampling(**{name: value})
