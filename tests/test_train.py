"""Training: it learns, and a run that is stopped in any way goes on to the same bits."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import checkpoint
from experiments import train as training
from experiments.checkpoint import CheckpointError
from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, fingerprint, to_dict
from experiments.data import make_data
from experiments.evaluate import at_length, evaluate
from experiments.metrics import Metrics, read_metrics
from experiments.stop import Stopped, stop_on_signal
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


@pytest.fixture(autouse=True)
def heed_ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, even where a shell started the tests in the background, who then ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(monkeypatch, at_step, *numbers):
    """Lets signals come while the batch of a step is made."""

    def make(*arguments):
        data = make_data(*arguments)
        make_batch = data.batch

        def batch(step, split, *rows):
            if (step, split) == (at_step, "train"):
                for number in numbers:
                    signal.raise_signal(number)
            return make_batch(step, split, *rows)

        data.batch = batch
        return data

    monkeypatch.setattr(training, "make_data", make)


def test_sigterm_stops_as_ctrl_c_does(uninterrupted, tmp_path, monkeypatch):
    result, run_dir = uninterrupted
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt(patch, 6, signal.SIGTERM)
        with pytest.raises(Stopped, match="Stopped micro after step 7") as stop:
            train(MICRO, tmp_path)
    assert stop.value.exit_status == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (tmp_path / "checkpoints" / "7").exists()
    with monkeypatch.context() as patch:  # a second signal does not wait for the step
        interrupt(patch, 9, signal.SIGTERM, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as stop:
            train(MICRO, tmp_path)
    assert stop.type is KeyboardInterrupt
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["7", "8"]
    with monkeypatch.context() as patch:  # what comes at the last step stops nothing
        interrupt(patch, 39, signal.SIGTERM)
        assert train(MICRO, tmp_path)["evaluation"] == result["evaluation"]
    assert records(tmp_path) == records(run_dir)


def test_second_sigterm_ends_the_process():
    code = """
import signal
from experiments.stop import stop_on_signal
with stop_on_signal() as stopped:
    signal.raise_signal(signal.SIGTERM)
    print(stopped(), flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("still here")
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, f"{int(signal.SIGTERM)}\n")


def test_other_threads_leave_the_handlers_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_on_signal() as stopped:
            seen.extend([signal.getsignal(signal.SIGTERM), stopped()])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, None]


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
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1.*no checkpoint yet"):
        train(dataclasses.replace(MICRO, model=DENSE), tmp_path)


@pytest.mark.parametrize(
    ("steps", "every", "signals", "good"),
    [(40, 1, (), 3), (40, 3, (), 3), (5, 3, (), 3), (40, 3, (signal.SIGTERM,), 3), (40, 30, (signal.SIGINT,), None)],
    ids=["every step", "some", "the last", "SIGTERM", "Ctrl-C without a checkpoint"],
)
@pytest.mark.parametrize("broken", ["params", "optimizer", "loss"])
def test_what_is_not_finite_is_never_saved(tmp_path, monkeypatch, broken, steps, every, signals, good):
    """From step 4 on a part of the state, or the loss, is NaN; no record of the loss falls there."""
    graph, make_state, _ = training._compile(DENSE, MICRO.optimizer, MICRO.train.steps)

    def step(state, _):
        bad = int(state.step) >= 3
        if bad and broken != "loss":
            spoilt = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, getattr(state, broken))
            state = state._replace(**{broken: spoilt})
        loss = jnp.float32(jnp.nan if bad and broken == "loss" else 1)
        return state._replace(step=state.step + 1), {"loss": loss}

    monkeypatch.setattr(training, "_compile", lambda *_: (graph, make_state, step))
    interrupt(monkeypatch, 4, *signals)
    length = TrainConfig(steps=steps, log_every=100, checkpoint_every=every, checkpoints_to_keep=1, tensorboard=False)
    config = dataclasses.replace(MICRO, model=DENSE, train=length)
    for _ in range(2):  # the same failure again, from the good checkpoint
        with pytest.raises(FloatingPointError, match=rf"{broken}.* nan at .*checkpoint.*{good or 'yet'}$"):
            train(config, tmp_path)
    kept = [entry.name for entry in (tmp_path / "checkpoints").iterdir()] if good else []
    assert kept == ([str(good)] if good else [])
    assert not (tmp_path / "result.json").exists()


def test_evaluation_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
    config = dataclasses.replace(MICRO, model=DENSE, train=dataclasses.replace(MICRO.train, evaluate_every=0))
    graph, make_state, _ = training._compile(DENSE, MICRO.optimizer, MICRO.train.steps)
    step = lambda state, _: (state._replace(step=state.step + 1), {"loss": jnp.float32(1)})  # noqa: E731
    monkeypatch.setattr(training, "_compile", lambda *_: (graph, make_state, step))
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: {"loss": float("inf"), "accuracy": 0.0})
    with pytest.raises(FloatingPointError, match="validation_loss is inf at step 40"):
        train(config, tmp_path)
    with pytest.raises(FloatingPointError, match="validation_loss is inf at step 10"):
        train(dataclasses.replace(config, train=MICRO.train), tmp_path / "during")
    assert not (tmp_path / "result.json").exists()


SHORT = dataclasses.replace(
    MICRO, model=DENSE, train=dataclasses.replace(MICRO.train, steps=6, evaluate_every=0, checkpoint_every=3)
)
LONGER = dataclasses.replace(
    SHORT,
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, beta2=0.95),
    train=dataclasses.replace(SHORT.train, steps=10),
)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Directory of a finished run of six steps."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    train(SHORT, run_dir)
    return run_dir


def walk(config, state, first):
    """The state after the last step of a configuration, from another one on, step by step."""
    _, _, train_step = training._compile(config.model, config.optimizer, config.train.steps)
    data = make_data(config.data, config.seed)
    for step in range(first, config.train.steps):
        state, _ = train_step(state, data.batch(step, "train"))
    return state


def first_state(config):
    return training._compile(config.model, config.optimizer, config.train.steps)[1](config.seed)


def test_finished_run_goes_on_with_more_steps(short, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(short, source)
    config = dataclasses.replace(LONGER, continue_from=str(source))
    with monkeypatch.context() as patch:
        interrupt(patch, 7, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config, tmp_path / "run")
    shutil.rmtree(source)  # a run that has a checkpoint of its own needs no other
    assert train(config, tmp_path / "run")["steps"] == 10
    expected = walk(LONGER, walk(SHORT, first_state(SHORT), 0), 6)
    chex.assert_trees_all_equal(nnx.state(load_run(tmp_path / "run")[1]), expected.params)
    written = read_metrics(tmp_path / "run")
    assert [record["step"] for record in written] == [7, 8, 9, 10]
    # The schedule is that of ten steps, two of them warm-up, as if it had been so from the start.
    rates = [5e-3 * (1 + np.cos(np.pi * (step - 2) / 8)) / 2 for step in (6, 7, 8, 9)]
    np.testing.assert_allclose([record["learning_rate"] for record in written], rates, rtol=1e-5)


def test_run_begins_with_the_parameters_of_another(short, tmp_path):
    source = nnx.state(load_run(short)[1])
    config = dataclasses.replace(LONGER, seed=5, init_from=str(short))
    train(config, tmp_path)
    expected = walk(config, first_state(config)._replace(params=source), 0)
    chex.assert_trees_all_equal(nnx.state(load_run(tmp_path)[1]), expected.params)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 11))
    with pytest.raises(ValueError, match=r"init_from is .* there, None here"):
        train(dataclasses.replace(config, init_from=None), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed is 1 there, 2 here"),
        ({"data": dataclasses.replace(SHORT.data, num_pairs=3)}, r"data\.num_pairs is 4 there, 3 here"),
        ({"model": dataclasses.replace(DENSE, mlp_size=16)}, r"model\.mlp_size is 32 there, 16 here"),
        ({"train": SHORT.train}, r"train\.steps must be above the 6 .*got train\.steps=6"),
        ({"continue_from": "nowhere"}, r"continue_from must be the directory of a run, got continue_from=nowhere"),
        ({"init_from": "nowhere"}, "init_from and continue_from exclude each other"),
        ({"continue_from": None, "init_from": "nowhere"}, "init_from must be the directory of a run"),
    ],
)
def test_run_that_cannot_go_on_from_another_is_an_error(short, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(LONGER, **({"continue_from": str(short)} | changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_those_of_the_other_run_are_an_error(short, tmp_path):
    """As with the text of another machine. The checkpoint is that of such a run, by its hash."""
    saved = json.loads((short / "config.json").read_text())
    state = checkpoint.restore(
        short / "checkpoints",
        jax.eval_shape(lambda: first_state(SHORT)),
        fingerprint(SHORT, saved["data"]),
    )[1]
    other = saved["data"] | {"sha256": "of another text"}
    checkpoint.save(tmp_path / "checkpoints", 6, state, fingerprint(SHORT, other), 1.0, 1)
    (tmp_path / "config.json").write_text(json.dumps(saved | {"data": other}))
    with pytest.raises(ValueError, match="of another text"):
        train(dataclasses.replace(LONGER, continue_from=str(tmp_path)), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_size": 16}, r"layers\.0\.mlp\.down\.kernel\.value is float32\[32, 16\] there, float32\[16, 16\] here"),
        ({"num_layers": 2, "layer_pattern": ("dense", "dense")}, r"layers\.1\.\S+ is missing there, float32\["),
    ],
)
def test_parameters_of_another_shape_are_named(short, tmp_path, changes, message):
    config = dataclasses.replace(LONGER, model=dataclasses.replace(DENSE, **changes), init_from=str(short))
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_run_directory_that_is_an_address_is_an_error(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run_dir must be a path of this machine"):
        train(SHORT, Path(address))
    for option in ("init_from", "continue_from"):
        with pytest.raises(ValueError, match=f"{option} must be a path of this machine"):
            train(dataclasses.replace(SHORT, **{option: address}), tmp_path / "run")
    with pytest.raises(ValueError, match="run_dir must be a path of this machine"):
        load_run(Path(address))
    assert list(tmp_path.iterdir()) == []


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
