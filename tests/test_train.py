"""Training: it learns, and a run that is stopped in any way goes on to the same bits."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import train as training
from experiments.checkpoint import CheckpointError
from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, to_dict
from experiments.data import make_data
from experiments.evaluate import at_length, evaluate
from experiments.metrics import Metrics, read_metrics
from experiments.train import load_run, train
from sparse_attn.nn import TransformerConfig

MICRO = RunConfig(
    name="micro",
    seed=1,
    model=TransformerConfig(
        vocab_size=24,
        num_layers=2,
        hidden_size=16,
        mlp_size=32,
        num_heads=2,
        head_dim=8,
        window_size=4,
        block_size=4,
        top_k=2,
        key_conv_width=3,
    ),
    data=DataConfig(sequence_length=32, batch_size=4, num_keys=8, num_values=8, num_fillers=8, num_pairs=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
    train=TrainConfig(
        steps=40, log_every=1, evaluate_every=10, evaluate_batches=2, checkpoint_every=4, tensorboard=False
    ),
)
DENSE = dataclasses.replace(MICRO.model, num_layers=1, layer_pattern=("dense",), key_conv_width=0)  # compiles faster
TIMES = ("seconds", "tokens_per_second")  # all that may differ between two runs


def records(run_dir):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run_dir)]


def start(run_dir):
    """The micro run as a process of its own, every field given on the command line."""
    flags = []
    for part in ("model", "data", "optimizer", "train"):
        for name, value in to_dict(MICRO)[part].items():
            if isinstance(value, bool):
                flags.append(f"--{part}.{name if value else 'no_' + name}")
            else:
                flags += [f"--{part}.{name}", *map(str, value if isinstance(value, list) else [value])]
    command = [
        sys.executable,
        "-m",
        "experiments",
        "train",
        "--name",
        "micro",
        "--seed",
        "1",
        "--run_dir",
        str(run_dir),
    ]
    root = Path(__file__).parents[1]
    return subprocess.Popen([*command, *flags], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def signal_when(process, is_time, number):
    """Sends a signal as soon as is_time() holds; returns the exit status and the output."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there in two minutes"
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Result and directory of the micro run, never stopped."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    return train(MICRO, run_dir), run_dir


def test_loss_falls_and_the_run_directory_says_everything(uninterrupted):
    result, run_dir = uninterrupted
    written = records(run_dir)
    assert [record["step"] for record in written] == list(range(1, 41))
    assert np.mean([r["loss"] for r in written[-5:]]) < 0.8 * np.mean([r["loss"] for r in written[:3]])
    assert [r["step"] for r in written if "validation_loss" in r] == [10, 20, 30]
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert result["config"] == to_dict(MICRO)
    assert result["steps"] == 40
    assert result["evaluation"]["num_targets"] == 2 * 4 * 4
    saved = json.loads((run_dir / "config.json").read_text())
    assert saved["config"] == to_dict(MICRO)
    assert {"git_revision", "git_dirty", "python", "jax", "device", "cpu_count"} < set(saved)
    assert sorted(entry.name for entry in (run_dir / "checkpoints").iterdir()) == ["36", "40"]


def test_finished_run_is_not_repeated(uninterrupted):
    result, run_dir = uninterrupted
    before = (run_dir / "metrics.jsonl").stat().st_mtime_ns
    assert train(MICRO, run_dir) == result
    assert (run_dir / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="resume"):
        train(MICRO, run_dir, resume=False)


def test_stopped_run_resumes_to_the_same_bits(uninterrupted, tmp_path):
    """kill -9 as soon as a checkpoint appears; then, in the next process, Ctrl-C; then on to the end in this one."""
    result, run_dir = uninterrupted
    status, _ = signal_when(start(tmp_path), (tmp_path / "checkpoints" / "4").exists, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as if the kill had come in the middle of a line
        file.write('{"step": 39, "lo')

    status, output = signal_when(start(tmp_path), (tmp_path / "checkpoints" / "12").exists, signal.SIGINT)
    assert status == 130
    assert "Stopped micro after step" in output
    assert f"To resume: python -m experiments train --name micro --seed 1 --run_dir {tmp_path}" in output
    last = read_metrics(tmp_path)[-1]["step"]
    assert 12 <= last < 40
    assert (tmp_path / "checkpoints" / str(last)).exists()

    resumed = train(MICRO, tmp_path)
    assert records(tmp_path) == records(run_dir)
    assert resumed["evaluation"] == result["evaluation"]
    _, model = load_run(run_dir)
    _, again = load_run(tmp_path)
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(again))


def test_run_directory_of_another_configuration_is_an_error(uninterrupted):
    _, run_dir = uninterrupted
    other = dataclasses.replace(MICRO, model=dataclasses.replace(MICRO.model, top_k=3))
    with pytest.raises(ValueError, match=r"model\.top_k is 2 there, 3 here"):
        train(other, run_dir)


def test_checkpoints_of_another_run_are_an_error(uninterrupted, tmp_path):
    _, run_dir = uninterrupted
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="another configuration"):
        train(dataclasses.replace(MICRO, seed=2), tmp_path)
    with pytest.raises(ValueError, match=r"without config\.json"):
        load_run(tmp_path)


def test_too_small_a_vocabulary_is_an_error(tmp_path):
    model = dataclasses.replace(MICRO.model, vocab_size=23)
    with pytest.raises(ValueError, match="vocab_size must be at least 24"):
        train(dataclasses.replace(MICRO, model=model), tmp_path)


def test_loss_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    graph, make_state, _ = training._compile(DENSE, MICRO.optimizer, MICRO.train.steps)
    compiled = graph, make_state, lambda state, _: (state, {"loss": np.float32("nan")})
    monkeypatch.setattr(training, "_compile", lambda *_: compiled)
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        train(dataclasses.replace(MICRO, model=DENSE), tmp_path)


def test_step_is_adamw_on_the_mean_over_targets():
    """The first step against one written out: gradient of the mean, clipped, AdamW with decay of matrices alone."""
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    config = dataclasses.replace(MICRO, model=DENSE, optimizer=optimizer)
    graph, make_state, train_step = training._compile(config.model, config.optimizer, config.train.steps)
    state = make_state(config.seed)
    batch = make_data(config.data, config.seed).batch(0, "train")

    def loss(params):
        logits = nnx.merge(graph, params)(batch["tokens"])
        places = np.nonzero(batch["targets"] >= 0)
        chosen = jax.nn.log_softmax(logits)[(*places, batch["targets"][places])]
        return -chosen.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    scale = min(1.0, 1 / float(optax.tree.norm(gradient)))
    params, gradient = jax.tree.map(np.asarray, (state.params, gradient))

    def move(path, param, gradient):
        gradient = gradient * scale
        decay = 0.0 if "scale" in jax.tree_util.keystr(path) else 0.5
        return param - 0.1 * (gradient / (abs(gradient) + 1e-8) + decay * param)

    expected = jax.tree.map_with_path(move, params, gradient)
    new, measured = train_step(state, batch)
    np.testing.assert_allclose(measured["loss"], value, rtol=1e-5)
    # The first step of Adam is the sign of the gradient: near zero it is ill-conditioned, so a few may differ.
    close = jax.tree.map(lambda a, b: np.isclose(a, b, atol=1e-3).mean(), new.params, expected)
    assert min(jax.tree.leaves(close)) > 0.98


def test_evaluation_is_that_of_loops(uninterrupted):
    _, run_dir = uninterrupted
    _, model = load_run(run_dir)
    config = dataclasses.replace(MICRO.data, task="needle", num_queries=2)
    data = make_data(config, 0)
    result = evaluate(model, data, 3)
    predict = nnx.jit(lambda model, tokens: model(tokens))
    losses, hits, by_depth = [], [], [[] for _ in range(10)]
    for step in range(3):
        batch = data.batch(step, "validation")
        logits = np.asarray(predict(model, batch["tokens"]), np.float64)
        for row, place in zip(*np.nonzero(batch["targets"] >= 0), strict=True):
            target, scores = batch["targets"][row, place], logits[row, place]
            losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target])
            hits.append(scores.argmax() == target)
            by_depth[min(int(batch["depth"][row, place] * 10), 9)].append(hits[-1])
    np.testing.assert_allclose(result["loss"], np.mean(losses), rtol=1e-5)
    assert result["accuracy"] == np.mean(hits)
    assert result["num_targets"] == len(hits) == 24
    assert result["accuracy_by_depth"] == [np.mean(each) if each else None for each in by_depth]


def test_evaluation_goes_past_the_training_length(uninterrupted):
    _, run_dir = uninterrupted
    config, model = load_run(run_dir)
    longer = at_length(config.data, 64)
    assert (longer.sequence_length, longer.batch_size) == (64, 2)
    result = evaluate(model, make_data(longer, 0), 2)
    assert result["num_targets"] == 2 * 2 * 4
    assert np.isfinite(result["loss"])


def test_bits_per_byte_of_uniform_guesses():
    """A model that knows nothing spends log2(vocab_size) bits on each target, and there are 0.8 bytes to a target."""

    class Bytes:
        bytes_per_token = 0.8

        def batch(self, step, split):
            tokens = np.full((2, 8), step, np.int32)
            return {"tokens": tokens, "targets": tokens, "segment_ids": np.zeros_like(tokens)}

    class Uniform(nnx.Module):
        def __call__(self, tokens, segment_ids):
            return jnp.zeros((*tokens.shape, 24))

    result = evaluate(Uniform(), Bytes(), 2)
    np.testing.assert_allclose(result["bits_per_byte"], np.log2(24) / 0.8, rtol=1e-6)


def test_text_trains_on_packed_documents(tmp_path):
    config = dataclasses.replace(
        MICRO,
        model=dataclasses.replace(DENSE, vocab_size=257),
        data=DataConfig(task="text", sequence_length=32, batch_size=4, max_bytes=300_000, packages=()),
        train=dataclasses.replace(MICRO.train, steps=6, evaluate_every=0, tensorboard=True),
    )
    result = train(config, tmp_path)
    assert 3 < result["evaluation"]["bits_per_byte"] < 9
    assert result["data"]["train_bytes"] > result["data"]["validation_bytes"] > 0
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_metrics_keep_each_step_once(tmp_path):
    metrics = Metrics(tmp_path, "run", 0, 10, tensorboard=False)
    for step in (2, 4, 6):
        metrics.write(step, {"loss": 1 / step})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])  # the record of step 6 is half-written
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 4]
    Metrics(tmp_path, "run", 2, 10, tensorboard=False).close()
    assert read_metrics(tmp_path) == [{"step": 2, "loss": 0.5}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        Metrics(tmp_path, "run", 2, 10, tensorboard=False)
