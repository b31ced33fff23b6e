"""The training loop: optax on the split state of an NNX model, resumable to the bit."""

import contextlib
import functools
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import checkpoint
from experiments.config import OptimizerConfig, RunConfig, decisive, fingerprint, from_dict, to_dict
from experiments.data import make_data
from experiments.data.source import Data
from experiments.evaluate import evaluate, token_losses
from experiments.mesh import (
    largest,
    local_rows,
    make_mesh,
    optimizer_shardings,
    parameter_shardings,
    require_agreement,
    split_rows,
)
from experiments.metrics import Metrics, check_local, write_json
from experiments.stop import Stopped, stop_on_signal
from experiments.utilization import device_metrics, train_flops
from sparse_attn.nn import Transformer, TransformerConfig

log = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """All that a step changes, and all that a checkpoint holds."""

    params: nnx.State
    optimizer: optax.OptState
    step: jax.Array  # int32 []


def train(config: RunConfig, run_dir: Path, resume: bool = True) -> dict[str, Any]:
    """Trains a model, or goes on where a stopped run of the same configuration left off, or returns its result.

    Writes config.json, metrics.jsonl, tensorboard/ and checkpoints/ as it goes, and result.json last. A run that goes
    on may differ from what it was in name, in how often it logs, evaluates and saves, and in the devices and the parts
    that a step is computed in; for more steps or another optimizer it takes another directory and config.continue_from.
    Checkpoints hold finite numbers alone: every save
    looks at the whole state and the loss, the steps between do not wait for that.

    Args:
      config: the run.
      run_dir: its directory, made if need be; a local one, and one that every process of the run sees.
      resume: whether to go on from a checkpoint that is there; if not, the directory must hold no run.

    Returns:
      The content of result.json: config, evaluation, seconds, steps, git_revision, data, num_parameters.

    Raises:
      ValueError: the configuration cannot be met or is not that of every process, or run_dir holds another run
        (CheckpointError: or a damaged one).
      FloatingPointError: the loss is not finite where it is logged, evaluated or saved, or the state where it is saved.
      Stopped: Ctrl-C or SIGTERM; the step was finished and a checkpoint written. It is a KeyboardInterrupt.
    """
    mesh = make_mesh(config.mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return _train(config, run_dir, resume, mesh)


def _train(config: RunConfig, run_dir: Path, resume: bool, mesh: Mesh | None) -> dict[str, Any]:
    """`train` on a mesh that is set."""
    check_local(run_dir, "run_dir")
    _check_directory(config, run_dir, resume)
    result_path, checkpoints = run_dir / "result.json", run_dir / "checkpoints"
    if result_path.exists():
        log.info("%s is there already", result_path)
        return json.loads(result_path.read_text())
    is_first = jax.process_index() == 0  # it writes, for all
    if not is_first:  # by then the first has written what the data need
        multihost_utils.sync_global_devices("data are there")
    data = make_data(config.data, config.seed, run_dir)
    if is_first:
        multihost_utils.sync_global_devices("data are there")
    if data.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least {data.vocab_size} for data.task={config.data.task!r}, got "
            f"model.vocab_size={config.model.vocab_size}"
        )
    identity = fingerprint(config, data.description)
    require_agreement(json.dumps([to_dict(config), identity]))
    how = (mesh, config.train.accumulate_steps, config.train.loss_chunk)
    graph, make_state, train_step = _compile(config.model, config.optimizer, config.train.steps, *how)
    restored = checkpoint.restore(checkpoints, jax.eval_shape(make_state, config.seed), identity)
    if restored:
        log.info("going on from step %d of %s", restored[0], checkpoints)
    step, state, seconds_before = restored or _first_state(config, data, make_state, mesh)
    machine = about()
    metrics = None
    if is_first:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", {"config": to_dict(config), "data": data.description, **machine})
        metrics = Metrics(run_dir, config.name, step, config.train.steps, config.train.tensorboard)
    batch_size = config.data.batch_size
    rows = local_rows(mesh, batch_size)
    flops = train_flops(config.model, config.data.sequence_length)
    signal_before: jax.Array | int = 0
    start = logged_at = time.monotonic()
    logged_step = step

    def save() -> None:
        checkpoint.require_finite(checkpoints, step, {"loss": measured["loss"]})
        if metrics:
            metrics.flush()
        seconds = seconds_before + time.monotonic() - start
        checkpoint.save(checkpoints, step, state, identity, seconds, config.train.checkpoints_to_keep)

    def evaluate_state() -> dict[str, Any]:
        model = nnx.merge(graph, state.params)
        chunk = config.train.loss_chunk
        return evaluate(model, data, config.train.evaluate_batches, loss_chunk=chunk, mesh=mesh)

    with contextlib.closing(metrics) if metrics else contextlib.nullcontext(), stop_on_signal() as stopped:
        while step < config.train.steps:
            batch = data.batch(step, "train", rows)  # made while the device is still at the step before
            state, measured = train_step(state, split_rows(batch, mesh, batch_size))
            step += 1
            if metrics:
                metrics.advance()
            values: dict[str, float] = {}
            is_last = step == config.train.steps
            if step % config.train.log_every == 0 or is_last:
                values = {name: float(value) for name, value in measured.items()}
                checkpoint.require_finite(checkpoints, step, {"loss": values["loss"]})
                now = time.monotonic()
                tokens = (step - logged_step) * batch_size * config.data.sequence_length
                values["tokens_per_second"] = tokens / (now - logged_at)
                values |= device_metrics(values["tokens_per_second"] * flops, config.mesh.data * config.mesh.model)
                logged_step, logged_at = step, now
            if config.train.evaluate_every and step % config.train.evaluate_every == 0 and not is_last:
                evaluation = evaluate_state()
                checkpoint.require_finite(checkpoints, step, {"validation_loss": evaluation["loss"]})
                values |= {f"validation_{k}": v for k, v in evaluation.items() if isinstance(v, float)}
                logged_step, logged_at = step, time.monotonic()
            if values and metrics:
                metrics.write(step, values)
            stop = stopped()  # asked once: a signal that comes while saving is met after the next step
            if mesh is not None and jax.process_count() > 1:
                # All must stop after the same step. What each says now, all read after the next, so that none waits.
                stop, signal_before = int(signal_before) or None, largest(stop or 0, mesh)
            if step % config.train.checkpoint_every == 0 or is_last or stop is not None:
                save()
            if stop is not None and not is_last:
                raise Stopped(f"Stopped {config.name} after step {step}; a checkpoint is in {checkpoints}.", stop)

    evaluation = evaluate_state()
    checkpoint.require_finite(checkpoints, step, {"validation_loss": evaluation["loss"]})
    result = {
        "config": to_dict(config),
        "evaluation": evaluation,
        "seconds": seconds_before + time.monotonic() - start,
        "steps": step,
        "git_revision": machine["git_revision"],
        "data": data.description,
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }
    if is_first:
        write_json(result_path, result)
    log.info("%s: %s", config.name, json.dumps(evaluation))
    return result


def load_run(run_dir: Path) -> tuple[RunConfig, Transformer]:
    """The configuration of a run and its model with the parameters of its newest checkpoint, on the first device.

    Raises:
      ValueError: run_dir holds no run with a checkpoint, or a damaged one.
    """
    config, _, (_, state, _) = _read_run(run_dir, "run_dir", None)
    graph, _, _ = _compile(config.model, config.optimizer, config.train.steps)
    return config, nnx.merge(graph, state.params)


def make_optimizer(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW after clipping; linear warm-up, then cosine decay until `steps`. Norm scales are not decayed."""

    def is_decayed(params: nnx.State) -> Any:
        return jax.tree.map_with_path(lambda path, _: "'scale'" not in jax.tree_util.keystr(path), params)

    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, steps - 1),
        steps,
        config.learning_rate * config.final_fraction,
    )
    adam = optax.adamw(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=is_decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam), schedule


@functools.cache  # the runs of a study that differ in their seed alone compile once
def _compile(
    model: TransformerConfig,
    optimizer_config: OptimizerConfig,
    steps: int,
    mesh: Mesh | None = None,
    accumulate_steps: int = 1,
    loss_chunk: int = 0,
) -> tuple[nnx.GraphDef, Callable[[int], TrainState], Callable[..., tuple[TrainState, dict[str, jax.Array]]]]:
    """The structure of the model, the state from a seed, and one step: `state, measured = train_step(state, batch)`.

    With a mesh, which must be set where they are called, the state is split over it as `parameter_shardings` says.
    """
    optimizer, schedule = make_optimizer(optimizer_config, steps)

    def make_model(seed: int | jax.Array) -> Transformer:
        mesh_axes = None if mesh is None else ("data", "model")
        return Transformer(model, mesh_axes=mesh_axes, rngs=nnx.Rngs(params=jax.random.key(seed)))

    def make_state(seed: int | jax.Array) -> TrainState:
        params = nnx.state(make_model(seed), nnx.Param)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    graph, _ = nnx.split(nnx.eval_shape(lambda: make_model(0)))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean_loss(params: nnx.State, batch: dict[str, jax.Array], count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Loss and accuracy, as sums over the targets of these rows divided by the count of the whole batch's."""
        losses, hits = token_losses(nnx.merge(graph, params), batch, loss_chunk)
        asked = batch["targets"] >= 0
        return jnp.where(asked, losses, 0).sum() / count, (hits & asked).sum() / count

    def accumulate(params: nnx.State, batch: dict[str, jax.Array], count: jax.Array) -> Any:
        """`mean_loss` of the microbatches one after the other, summed in float32; each has rows of every device."""
        parts = {
            name: array.reshape(-1, accumulate_steps, *array.shape[1:]).swapaxes(0, 1) for name, array in batch.items()
        }

        def add(total: Any, part: dict[str, jax.Array]) -> tuple[Any, None]:
            (loss, accuracy), gradient = jax.tree.map(jnp.add, total, mean_loss(params, part, count))
            if mesh is not None:  # no device keeps the whole gradient
                gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)
            return ((loss, accuracy), gradient), None

        zero = jnp.zeros((), jnp.float32)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), params)
        (measured, gradient), _ = jax.lax.scan(add, ((zero, zero), zeros), parts)
        return measured, jax.tree.map(lambda each, param: each.astype(param.dtype), gradient, params)

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        count = jnp.maximum((batch["targets"] >= 0).sum(), 1)
        differentiate = mean_loss if accumulate_steps == 1 else accumulate
        (loss, accuracy), gradient = differentiate(state.params, batch, count)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        measured = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(state.step),
        }
        return TrainState(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1), measured

    if mesh is None:
        return graph, jax.jit(make_state), jax.jit(train_step, donate_argnums=0)
    shapes = jax.eval_shape(make_state, 0)
    params = jax.tree.unflatten(jax.tree.structure(shapes.params), parameter_shardings(model, mesh))
    whole: Any = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(params, optimizer_shardings(optimizer, shapes.optimizer, params, mesh), whole)
    make_state = jax.jit(make_state, out_shardings=shardings)
    return graph, make_state, jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, whole))


def _read_run(
    run_dir: Path, option: str, mesh: Mesh | None
) -> tuple[RunConfig, dict[str, Any], tuple[int, TrainState, float]]:
    """Configuration and data of the run that an option names, and step, state and seconds of its newest checkpoint."""
    check_local(run_dir, option)
    path = run_dir / "config.json"
    if not path.exists():
        raise ValueError(f"{option} must be the directory of a run, got {option}={run_dir} without config.json")
    saved = json.loads(path.read_text())
    config = from_dict(saved["config"])
    _, make_state, _ = _compile(config.model, config.optimizer, config.train.steps, mesh)
    identity = fingerprint(config, saved["data"])
    restored = checkpoint.restore(run_dir / "checkpoints", jax.eval_shape(make_state, config.seed), identity)
    if restored is None:
        raise ValueError(f"{option} must be the directory of a run with a checkpoint, got {option}={run_dir}")
    return config, saved["data"], restored


def _first_state(
    config: RunConfig, data: Data, make_state: Callable[[int], TrainState], mesh: Mesh | None
) -> tuple[int, TrainState, float]:
    """Steps done, state and seconds of training where a run begins: its seed's, or those of the run that it names."""
    if config.continue_from is not None:
        there, data_there, begin = _read_run(Path(config.continue_from), "continue_from", mesh)
        different = _differences(there, config, "seed", "model", "data")
        if not different and data_there != json.loads(json.dumps(data.description)):
            different = f"its data are {data_there} there, {data.description} here"
        if different:
            raise ValueError(f"continue_from={config.continue_from} holds a run of another configuration ({different})")
        if begin[0] >= config.train.steps:
            raise ValueError(
                f"train.steps must be above the {begin[0]} that continue_from={config.continue_from} has done, got "
                f"train.steps={config.train.steps}"
            )
        log.info("going on from step %d of %s", begin[0], config.continue_from)
        return begin
    state = make_state(config.seed)
    if config.init_from is None:
        return 0, state, 0.0
    _, _, (step, source, _) = _read_run(Path(config.init_from), "init_from", mesh)
    new, old = _describe(state.params), _describe(source.params)
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name):
            raise ValueError(
                f"init_from={config.init_from} must hold the parameters of this model: {name} is "
                f"{old.get(name, 'missing')} there, {new.get(name, 'missing')} here"
            )
    log.info("beginning with the parameters of step %d of %s", step, config.init_from)
    return 0, state._replace(params=source.params), 0.0


def _describe(params: nnx.State) -> dict[str, str]:
    """Dtype and shape of each parameter by its name."""
    return {name: checkpoint.describe(leaf) for name, leaf in checkpoint.named_leaves(params).items()}


def _check_directory(config: RunConfig, run_dir: Path, resume: bool) -> None:
    path = run_dir / "config.json"
    if not path.exists():
        return
    if not resume:
        raise ValueError(f"run_dir must hold no run when resume is off, got run_dir={run_dir}")
    there = from_dict(json.loads(path.read_text())["config"])
    if different := _differences(there, config):
        raise ValueError(
            f"run_dir={run_dir} holds a run of another configuration ({different}); use another run_dir, with "
            "continue_from to go on from that run with more steps or another optimizer"
        )


def _differences(there: RunConfig, here: RunConfig, *parts: str) -> str:
    """Which decisive values are not the same, by their names; of some parts of the configuration if any are given."""
    old, new = decisive(there), decisive(here)
    names = [name for name in old if not parts or name.partition(".")[0] in parts]
    return "; ".join(f"{name} is {old[name]!r} there, {new[name]!r} here" for name in names if old[name] != new[name])


def about() -> dict[str, Any]:
    """The code and the machine that a run ran on."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_revision": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
    }
