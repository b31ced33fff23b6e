"""Presets build; the paper's models have the paper's size and lower to one train step."""

import jax
import numpy as np
import pytest

from experiments import train as training
from experiments.configs import PRESETS, load_preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_under_their_own_name(name):
    preset = load_preset(name)
    assert preset.name == name
    assert preset.key_conv_block in preset.block_sizes
    assert preset.lengths[0] == preset.recall.data.sequence_length
    assert preset.recall.data.num_keys * 3 <= preset.recall.model.vocab_size


@pytest.mark.parametrize(
    ("name", "millions"), [("small", (14, 15)), ("paper-340m", (330, 350)), ("paper-1b", (1000, 1200))]
)
def test_models_have_their_size_and_lower(name, millions):
    config = load_preset(name).language_model
    _, make_state, train_step = training._compile(config.model, config.optimizer, config.train.steps)
    state = jax.eval_shape(make_state, 0)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    assert millions[0] * 1e6 < count < millions[1] * 1e6
    tokens = jax.ShapeDtypeStruct((config.data.batch_size, config.data.sequence_length), np.int32)
    lowered = train_step.lower(state, {"tokens": tokens, "targets": tokens, "segment_ids": tokens})
    assert jax.tree.map(lambda new: new.shape, lowered.out_info[0]) == jax.tree.map(lambda old: old.shape, state)
