"""Runs on meshes of eight CPU devices, beside one device; prints as JSON what `test_train_mesh.py` looks at.

A program of its own: the number of devices is settled when JAX starts. `python -m tests.train_mesh DIRECTORY`.
"""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import train as training
from experiments.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.data import make_data
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


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir)]


def parameters(run_dir: Path) -> np.ndarray:
    """All parameters of a run's newest checkpoint, one after the other."""
    _, model = load_run(run_dir)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))])


def stop_after(step: int, config: RunConfig, run_dir: Path) -> None:
    """Trains until SIGTERM comes in the middle of a step."""

    def make(*arguments):
        data = make_data(*arguments)
        make_batch = data.batch

        def batch(number, split, *rows):
            if (number, split) == (step - 1, "train"):
                signal.raise_signal(signal.SIGTERM)
            return make_batch(number, split, *rows)

        data.batch = batch
        return data

    training.make_data = make
    try:
        train(config, run_dir)
        raise AssertionError("the run was not stopped")
    except Stopped:
        training.make_data = make_data


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
    for name, config in meshes.items():
        train(config, out / name)
        tell(name, out / name)

    stop_after(4, meshes["2x4"], out / "stopped")
    results["stopped"] = {"steps": len(losses(out / "stopped"))}
    for name, config in {"same": meshes["2x4"], "other": meshes["4x2"], "single": CONFIG}.items():
        shutil.copytree(out / "stopped", out / f"resumed on {name}")
        train(config, out / f"resumed on {name}")
        tell(f"resumed on {name}", out / f"resumed on {name}")
    parts = dataclasses.replace(CONFIG.train, accumulate_steps=2, loss_chunk=5)
    train(dataclasses.replace(meshes["4x2"], train=parts), out / "parts")
    tell("parts", out / "parts")

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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
