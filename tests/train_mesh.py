"""Runs on meshes of eight CPU devices, beside one device; prints as JSON what `test_train_mesh.py` looks at.

A program of its own: the number of devices is settled when JAX starts. `python -m tests.train_mesh DIRECTORY`, or for
one process of two, `python -m tests.train_mesh DIRECTORY PORT PROCESS killed|resumed`.
"""

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import train as training
from experiments.config import DataConfig, DistributedConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.data import make_data
from experiments.mesh import join_processes
from experiments.metrics import read_metrics
from experiments.stop import Stopped
from experiments.train import load_run, train
from sparse_attn.nn import TransformerConfig

# Every axis can be split into eight, but that of the key convolution's width, the norms' and (17) the vocabulary's.
CONFIG = RunConfig(
    name="mesh",
    seed=3,
    model=TransformerConfig(
        vocab_size=17,
        num_layers=2,
        hidden_size=16,
        mlp_size=32,
        num_heads=8,
        head_dim=2,
        window_size=4,
        block_size=4,
        top_k=2,
        key_conv_width=3,
    ),
    data=DataConfig(sequence_length=16, batch_size=8, num_keys=6, num_values=6, num_fillers=5, num_pairs=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    train=TrainConfig(
        steps=6, log_every=1, evaluate_every=0, evaluate_batches=1, checkpoint_every=3, tensorboard=False
    ),
)
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8)}


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    return [(record["loss"], record["gradient_norm"]) for record in read_metrics(run_dir)]


def parameters(run_dir: Path) -> np.ndarray:
    """All parameters of a run's newest checkpoint, one after the other."""
    _, model = load_run(run_dir)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))])


@contextlib.contextmanager
def signal_before(step: int, number: int) -> Iterator[None]:
    """Lets a signal come to this process while the batch of a step is made."""

    def make(*arguments):
        data = make_data(*arguments)
        make_batch = data.batch

        def batch(at, split, *rows):
            if (at, split) == (step - 1, "train"):
                signal.raise_signal(number)
            return make_batch(at, split, *rows)

        data.batch = batch
        return data

    training.make_data = make
    yield
    training.make_data = make_data


def stop(config: RunConfig, run_dir: Path) -> int:
    """Trains until a signal stops it; returns the steps done."""
    try:
        train(config, run_dir)
    except Stopped:
        return int(max(entry.name for entry in (run_dir / "checkpoints").iterdir()))
    raise AssertionError("the run was not stopped")


def main(out: Path) -> None:
    results: dict[str, dict] = {}

    def tell(name: str, run_dir: Path) -> None:
        evaluation = json.loads((run_dir / "result.json").read_text())["evaluation"]
        results[name] = {
            "losses": losses(run_dir),
            "evaluation": evaluation,
            "parameters": parameters(run_dir).tolist(),
        }

    train(CONFIG, out / "one")
    tell("one", out / "one")
    meshes = {name: dataclasses.replace(CONFIG, mesh=MeshConfig(*sizes)) for name, sizes in MESHES.items()}
    parts = dataclasses.replace(CONFIG.train, accumulate_steps=2, loss_chunk=5)
    meshes["4x2"] = dataclasses.replace(meshes["4x2"], train=parts)
    for name, config in meshes.items():
        train(config, out / name)
        tell(name, out / name)

    with signal_before(4, signal.SIGTERM):
        results["stopped"] = {"steps": stop(meshes["2x4"], out / "stopped")}
    for name, config in {"same": meshes["2x4"], "other": meshes["4x2"], "single": CONFIG}.items():
        shutil.copytree(out / "stopped", out / f"resumed on {name}")
        train(config, out / f"resumed on {name}")
        tell(f"resumed on {name}", out / f"resumed on {name}")
    for name, config in {"one": CONFIG, "2x4": meshes["2x4"]}.items():
        train(dataclasses.replace(config, init_from=str(out / "8x1")), out / f"begun on {name}")
        tell(f"begun on {name}", out / f"begun on {name}")

    mesh = training.make_mesh(meshes["2x4"].mesh)
    with jax.set_mesh(mesh):
        state = training._compile(CONFIG.model, CONFIG.optimizer, CONFIG.train.steps, mesh)[1](0)
    results["bytes"] = {name: _bytes(tree) for name, tree in state._asdict().items()}
    print(json.dumps(results))


def _bytes(tree: Any) -> tuple[int, list[int]]:
    """Bytes of the arrays as wholes, and on every device."""
    leaves = jax.tree.leaves(tree)
    held = [[leaf.addressable_shards[device].data.nbytes for leaf in leaves] for device in range(8)]
    return sum(leaf.nbytes for leaf in leaves), list(map(sum, held))


def main_of_process(out: Path, port: str, process: int, is_killed: bool) -> None:
    """One of two processes with two devices each: killed after step 5; or goes on, is stopped, and goes on to the end.

    SIGTERM comes to the second process alone, in step 4, the first after the checkpoint. Before that, the two try to
    train with different seeds.
    """
    join_processes(DistributedConfig(coordinator_address=f"localhost:{port}", num_processes=2, process_id=process))
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, model=2))
    if is_killed:
        with signal_before(6, signal.SIGKILL):
            train(config, out)
    try:
        train(dataclasses.replace(config, seed=process), out / "different")
    except ValueError as error:
        message = str(error)
    with signal_before(4, signal.SIGTERM) if process == 1 else contextlib.nullcontext():
        steps = stop(config, out)
    result = train(config, out)
    print(json.dumps({"different": message, "stopped": steps, "evaluation": result["evaluation"]}))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        main_of_process(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "killed")
