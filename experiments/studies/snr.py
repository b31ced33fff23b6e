"""Does the statistical model say when routing finds the right block? First on drawn keys, then on trained models."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.data import make_data
from experiments.preset import Preset, SnrConfig
from experiments.studies.variants import write_study
from experiments.train import load_run
from sparse_attn import route_moba, theory
from sparse_attn.nn import Transformer


def run(preset: Preset, out: Path) -> dict[str, Any]:
    """Monte Carlo, then every trained recall run that is in out/recall; writes snr/study.json."""
    results = sorted((out / "recall").glob("*/result.json"))
    runs = [
        path.parent for path in results if "moba" in json.loads(path.read_text())["config"]["model"]["layer_pattern"]
    ]

    def measure() -> dict[str, Any]:
        trained = [row for path in tqdm(runs, desc="snr", unit="run") for row in measure_run(path, preset.snr)]
        return {"monte_carlo": simulate(preset.snr), "trained": trained, **agreement(trained)}

    settings = {"config": dataclasses.asdict(preset.snr), "runs": [path.name for path in runs]}
    return write_study(out, "snr", preset.name, settings, measure)


def simulate(config: SnrConfig) -> list[dict[str, Any]]:
    """Draws queries and keys as the statistical model has them and sends them through the router.

    Returns:
      A row for each point: what was drawn, and of SNR, failure (share of irrelevant blocks that beat the relevant one)
      and recall@k (share of queries whose choice holds the relevant block) the theory, the measured value and its
      standard error ("spread") over the groups.
    """
    centre = {name: getattr(config, name) for name in ("head_dim", "block_size", "num_related", "delta_mu")}
    sweeps = {
        "head_dim": config.head_dims,
        "block_size": config.block_sizes,
        "num_related": config.nums_related,
        "delta_mu": config.delta_mus,
    }
    points = {tuple({**centre, name: value}.items()): None for name, values in sweeps.items() for value in values}
    rows = []
    for number, items in enumerate(tqdm(points, desc="monte carlo", unit="point")):
        point = dict(items)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), config.groups)
        draw = {
            **point,
            "cluster_gap": config.cluster_gap,
            "num_blocks": config.num_blocks,
            "top_k": config.top_k,
            "trials": config.trials // config.groups,
        }
        groups = np.array([_simulate_group(key, **draw) for key in keys], np.float64)  # [groups, 3]
        gap = theory.effective_gap(point["delta_mu"], point["num_related"], config.cluster_gap)
        snr = theory.snr(point["head_dim"], point["block_size"], gap)
        expected = {
            "snr": snr,
            "failure": theory.failure_probability(snr),
            "recall": theory.recall_at_k(snr, config.num_blocks, config.top_k),
        }
        row: dict[str, Any] = {**point, "num_blocks": config.num_blocks, "top_k": config.top_k}
        for index, (name, value) in enumerate(expected.items()):
            row[f"{name}_theory"] = float(value)
            row[f"{name}_measured"] = float(groups[:, index].mean())
            row[f"{name}_spread"] = float(groups[:, index].std(ddof=1) / np.sqrt(config.groups))
        rows.append(row)
    return rows


@functools.partial(jax.jit, static_argnames=("head_dim", "block_size", "num_related", "num_blocks", "top_k", "trials"))
def _simulate_group(
    key: jax.Array,
    *,
    head_dim: int,
    block_size: int,
    num_related: int,
    delta_mu: float,
    cluster_gap: float,
    num_blocks: int,
    top_k: int,
    trials: int,
) -> jax.Array:
    """SNR, failure rate and recall@k of one group of trials. Block 0 is the relevant one."""
    query_key, noise_key = jax.random.split(key)
    query = jax.random.normal(query_key, (trials, head_dim))
    query = query / jnp.linalg.norm(query, axis=-1, keepdims=True)  # [trials, head_dim]
    noise = jax.random.normal(noise_key, (trials, num_blocks * block_size, head_dim)) * head_dim**-0.5
    place = jnp.arange(num_blocks * block_size)
    gap = jnp.where(place == 0, delta_mu, jnp.where(place < num_related, cluster_gap, 0.0))
    keys = noise + gap[None, :, None] * query[:, None]  # [trials, keys, head_dim]
    product = jnp.einsum("nsd,nd->ns", keys, query)  # n trials, s keys
    score = product.reshape(trials, num_blocks, block_size).mean(-1)  # [trials, blocks]
    difference = score[:, :1] - score[:, 1:]
    selection = route_moba(query[:, None, None], keys[:, :, None], block_size=block_size, top_k=top_k, is_causal=False)
    recall = (selection.indices == 0).any(-1).mean()
    # The differences of one trial share the relevant block's noise: one of them estimates the standard deviation.
    snr = difference.mean() / difference[:, 0].std(ddof=1)
    return jnp.stack([snr, (difference < 0).mean(), recall])


def measure_run(run_dir: Path, config: SnrConfig) -> list[dict[str, Any]]:
    """Routing of a trained recall model on validation data, a row for each MoBA layer and query head.

    The relevant block of a question is the one that holds the value to copy, which stands behind the key in the pair.
    """
    run_config, model = load_run(run_dir)
    data = make_data(run_config.data, run_config.seed)
    layers: dict[int, list[tuple[np.ndarray, ...]]] = {}
    for step in range(config.evaluate_batches):
        batch = data.batch(step, "validation")
        relevant = find_values(batch["tokens"], batch["targets"])
        for layer, inputs in enumerate(attention_inputs(model, jnp.asarray(batch["tokens"]))):
            layers.setdefault(layer, []).append((*map(np.asarray, inputs[:2]), relevant))
    kinds = [kind for kind in run_config.model.layer_kinds if kind != "sliding_window"]
    rows = []
    for layer, batches in layers.items():
        if kinds[layer] != "moba":
            continue
        query, key, relevant = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        for head in range(query.shape[2]):
            key_head = head // (query.shape[2] // key.shape[2])
            block_size, top_k = run_config.model.block_size, run_config.model.top_k
            measured = measure_routing(query[:, :, head], key[:, :, key_head], relevant, block_size, top_k)
            rows.append(
                {
                    "run": f"recall/{run_dir.name}",
                    "variant": run_dir.name.rpartition("-seed")[0],
                    "seed": run_config.seed,
                    "layer": layer,
                    "head": head,
                    "block_size": block_size,
                    "top_k": top_k,
                    "key_conv_width": run_config.model.key_conv_width,
                    **measured,
                }
            )
    return rows


@nnx.jit
def attention_inputs(model: Transformer, tokens: jax.Array) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """`Transformer.attention_inputs`, compiled."""
    return model.attention_inputs(tokens)


def find_values(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Where the value stands that answers each question of a recall batch.

    Args:
      tokens: int `[batch, sequence]`; pairs stand in the first half.
      targets: int `[batch, sequence]`, -1 where nothing is asked.

    Returns:
      int `[batch, sequence]`, -1 where nothing is asked.
    """
    half = tokens.shape[1] // 2
    is_key = tokens[:, :half, None] == tokens[:, None, :]  # [batch, place of the pair, question]
    return np.where(targets >= 0, is_key.argmax(1) + 1, -1)


def measure_routing(
    query: np.ndarray, key: np.ndarray, relevant: np.ndarray, block_size: int, top_k: int
) -> dict[str, float | int]:
    """SNR of one head's real scores, the share of questions whose relevant block is chosen, and the model's prediction.

    D is the score of the relevant block less that of another block that the query may choose (earlier than its own,
    which is chosen anyway and takes one of the top_k). SNR = mean(D) / std(D) over questions and other blocks.
    Prediction: mean over questions of recall@(top_k - 1) among the blocks before the query's own, at that SNR. It
    assumes normal, equally noisy scores and one SNR for all questions.

    Args:
      query: `[batch, sequence, head_dim]`.
      key: `[batch, sequence, head_dim]`.
      relevant: int `[batch, sequence]`, place of the token to find, -1 where there is none. Questions whose relevant
        block is their own are left out.
    """
    batch, length, head_dim = key.shape
    num_blocks = -(-length // block_size)
    padded = np.pad(key.astype(np.float64), ((0, 0), (0, num_blocks * block_size - length), (0, 0)))
    counts = np.minimum(block_size, length - block_size * np.arange(num_blocks))
    means = padded.reshape(batch, num_blocks, block_size, head_dim).sum(2) / counts[:, None]
    score = np.einsum("btd,bnd->btn", query, means)  # b batch, t queries, n blocks
    own = np.arange(length) // block_size  # [sequence]
    block = relevant // block_size  # [batch, sequence]
    asked = (relevant >= 0) & (block < own)
    rows, places = np.nonzero(asked)
    score, block, candidates = score[rows, places], block[rows, places], own[places]  # [questions, blocks], [questions]
    hit = np.take_along_axis(score, block[:, None], 1)
    ids = np.arange(num_blocks)
    is_other = (ids < candidates[:, None]) & (ids != block[:, None])
    difference = (hit - score)[is_other]
    if not difference.size:
        raise ValueError(f"block_size must leave questions another block to choose, got block_size={block_size}")
    snr = float(difference.mean() / difference.std())
    heads = (jnp.asarray(array)[:, :, None] for array in (query, key))
    indices = np.asarray(route_moba(*heads, block_size=block_size, top_k=top_k, is_causal=True).indices)[
        :, 0
    ]  # [batch, queries, k]
    found = (indices[rows, places] == block[:, None]).any(1)
    predicted = theory.recall_at_k(snr, candidates, top_k - 1)
    return {
        "num_queries": int(asked.sum()),
        "snr_measured": snr,
        "recall_measured": float(found.mean()),
        "recall_predicted": float(predicted.mean()),
    }


def agreement(trained: list[dict[str, Any]]) -> dict[str, float | None]:
    """How well predictions match over all heads: Pearson and rank correlation, mean absolute gap.

    None where there are fewer than three heads or nothing varies.
    """
    measured, predicted = (np.array([row[name] for row in trained]) for name in ("recall_measured", "recall_predicted"))
    if len(trained) < 3 or np.ptp(measured) == 0 or np.ptp(predicted) == 0:
        return {"correlation": None, "rank_correlation": None, "mean_absolute_gap": None}

    def rank(values: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.sort(values), values) + np.searchsorted(np.sort(values), values, "right")

    return {
        "correlation": float(np.corrcoef(measured, predicted)[0, 1]),
        "rank_correlation": float(np.corrcoef(rank(measured), rank(predicted))[0, 1]),
        "mean_absolute_gap": float(np.abs(measured - predicted).mean()),
    }
