"""Configurations: checks, round trip through JSON, what makes two runs the same."""

import dataclasses
import json

import pytest

from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, fingerprint, from_dict, to_dict

CHANGED = RunConfig(seed=3, data=DataConfig(task="text", packages=("numpy",)), train=TrainConfig(steps=7))

DATA = {"task": "text", "sha256": "a"}


@pytest.mark.parametrize("config", [RunConfig(), CHANGED])
def test_configuration_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_field_is_an_error():
    fields = to_dict(RunConfig())
    fields["data"]["chunk"] = 3
    with pytest.raises(ValueError, match="chunk"):
        from_dict(fields)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": dataclasses.replace(RunConfig().model, block_size=8)},
        {"data": DataConfig(num_pairs=5)},
        {"optimizer": OptimizerConfig(beta2=0.95)},
        {"train": TrainConfig(steps=801)},
        {"init_from": "a"},
        {"continue_from": "a"},
    ],
)
def test_fingerprint_changes_with_all_that_decides_the_parameters(change):
    assert fingerprint(dataclasses.replace(RunConfig(), **change), DATA) != fingerprint(RunConfig(), DATA)


def test_fingerprint_ignores_name_and_logging():
    other = RunConfig(name="b", train=TrainConfig(log_every=1, checkpoint_every=3, tensorboard=False))
    assert fingerprint(other, DATA) == fingerprint(RunConfig(), DATA)


def test_fingerprint_changes_with_the_data():
    assert fingerprint(RunConfig(), DATA | {"sha256": "b"}) != fingerprint(RunConfig(), DATA)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DataConfig(sequence_length=3), "sequence_length"),
        (lambda: DataConfig(batch_size=0), "batch_size"),
        (lambda: DataConfig(validation_fraction=1.0), "validation_fraction"),
        (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm"),
        (lambda: OptimizerConfig(warmup_steps=-1), "warmup_steps"),
        (lambda: TrainConfig(steps=0), "steps"),
        (lambda: TrainConfig(checkpoints_to_keep=0), "checkpoints_to_keep"),
    ],
)
def test_bad_values_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()
