"""Which system keeps most of attention at an equal number of attended pairs?

Queries, keys and values are those of the last attention layer without positions of the dense models of the block_size
and language_model studies, on validation data: one recalls and looks at few keys, the other writes text and looks at
many. Every system gets the setting that brings its density (exactly attended pairs over visible pairs) nearest to the
target, and is measured against dense attention. Systems for text are compared under a causal mask, those for images and
video without one: two leagues, each with an oracle that knows the true mass of every pair of blocks.
"""

import dataclasses
import functools
import inspect
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility
from tqdm import tqdm

from experiments.config import to_dict
from experiments.data import make_data
from experiments.evaluate import at_length
from experiments.preset import ComparisonConfig, Preset
from experiments.studies.snr import attention_inputs
from experiments.studies.variants import dense, keep_to, share_cores, train_variants, write_study
from experiments.train import load_run
from sparse_attn.grammar import choose, score
from sparse_attn.selection import LevelMap
from sparse_attn.systems import (
    adaspa,
    bsfa,
    infllm_v2,
    moba,
    pbs_attention,
    pisa,
    prism,
    proxy_attention,
    psa,
    rectified,
    sale,
    sla,
    vmoba,
    xattention,
)
from sparse_attn.systems.recipe import Recipe

_STEPS = 5  # of the bisection over a setting


class Oracle:
    """For every query block the key blocks of largest true attention mass: what choosing per tile can reach at best."""

    RECIPE = Recipe(
        name="oracle",
        paper="",
        blocks="",
        describe="none",
        score="exact mass",
        choose="per query block and head: top-k, the diagonal forced if causal",
    )

    @staticmethod
    def select(query: jax.Array, key: jax.Array, *, top_k: int, block_size: int, is_causal: bool) -> LevelMap:
        """LevelMap of the top_k blocks of largest mass."""
        visibility = make_visibility(query, key, is_causal=is_causal)
        everything = jnp.ones((query.shape[0], query.shape[2], *(-(-x.shape[1] // block_size) for x in (query, key))))
        full = LevelMap(everything.astype(jnp.int8), block_size, block_size)
        scale = query.shape[-1] ** -0.5
        log_sum_exp = attend_tiles(query, key, key, full, visibility, scale=scale).log_sum_exp()
        sizes = {"query_block_size": block_size, "key_block_size": block_size}
        mass = score.exact_blocks(query, key, visibility, **sizes, scale=scale, log_sum_exp=log_sum_exp)
        if is_causal:
            mass += jnp.eye(mass.shape[-2], mass.shape[-1]) * block_size
        return LevelMap(
            choose.top_k(jnp.where(mass > 0, mass, -jnp.inf), top_k).astype(jnp.int8), block_size, block_size
        )

    @staticmethod
    def attention(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        """Exact attention over `select`."""
        visibility = make_visibility(query, key, is_causal=options["is_causal"])
        levels = Oracle.select(query, key, **options)
        return attend_tiles(query, key, value, levels, visibility, scale=query.shape[-1] ** -0.5).output()


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A system with one dial: `options(setting, query, key)` are its keywords; density grows from `low` to `high`."""

    system: ModuleType | type[Oracle]
    is_causal: bool
    options: Callable[[float, jax.Array, jax.Array], dict[str, Any]]
    low: float = 0.0
    high: float = 1.0


def contestants(config: ComparisonConfig) -> list[Contestant]:
    """Every system that chooses by itself, without trained parts: x is the dial, of which counts are rounded.

    BSFA's thresholds are calibrated on the very sequences it is measured on, and SLA's linear branch is switched off by
    its untrained projection.
    """
    size, blocks = config.block_size, -(-config.sequence_length // config.block_size)
    both: dict[str, Any] = {"query_block_size": size, "key_block_size": size}
    one = {"block_size": size}

    def count(x: float) -> int:
        return max(1, round(x))

    def tune_bsfa(x: float, query: jax.Array, key: jax.Array) -> dict[str, Any]:
        return {**both, "thresholds": bsfa.calibrate(query, key, top_k=count(x), **both)}

    def split_bands(x: float, query: jax.Array, key: jax.Array) -> dict[str, Any]:
        thresholds = {"high_threshold": x, "low_threshold": x}
        return {**one, **thresholds, "high_size": query.shape[3] // 2, "low_size": 3 * query.shape[3] // 4}

    def draw_samples(x: float, query: jax.Array, key: jax.Array) -> dict[str, Any]:
        bounds = tuple(min(1.0, x + more) for more in (0.0, 0.1, 0.2, 0.4))
        return {**both, "bounds": bounds, "offsets": psa.draw_offsets(jax.random.key(0), query, key, **both)}

    def switch_off(x: float, query: jax.Array, key: jax.Array) -> dict[str, Any]:
        head_dim = query.shape[3]
        return {**both, "density": x, "projection": jnp.zeros((head_dim, head_dim)), "bias": jnp.zeros(head_dim)}

    pools = {
        "pool_size": size // 2,
        "pool_stride": size // 4,
        "initial_blocks": 1,
        "local_blocks": 0,
        "dense_length": 1,
    }
    sale_sizes = {**both, "local_window": size, "dense_length": 1}
    line = {"grid_shape": (config.sequence_length, 1, 1), "box_shape": (size,)}
    causal: list[tuple[Any, ...]] = [
        (moba, lambda x, q, k: {**one, "top_k": count(x)}, 1, blocks),
        (infllm_v2, lambda x, q, k: {**one, **pools, "top_k": count(x)}, 1, blocks),
        (xattention, lambda x, q, k: {**one, "stride": size // 4, "threshold": x}, 0, 1),
        (prism, split_bands, 0, 1),
        (pbs_attention, lambda x, q, k: {**one, "segment_size": 2 * size, "threshold": x}, 0, 1),
        (proxy_attention, lambda x, q, k: {**one, "min_tokens": 1, "mass": x}, 0, 1),
        (bsfa, tune_bsfa, 1, blocks),
        (sale, lambda x, q, k: {**sale_sizes, "threshold": 10 ** (2 - 8 * x)}, 0, 1),
        (Oracle, lambda x, q, k: {**one, "is_causal": True, "top_k": count(x)}, 1, blocks),
    ]
    bidirectional: list[tuple[Any, ...]] = [
        (vmoba, lambda x, q, k: {**line, "threshold": x}, 0, 1),
        (psa, draw_samples, 0, 1),
        (pisa, lambda x, q, k: {**one, "density": x}, 0, 1),
        (sla, switch_off, 0, 1),
        (adaspa, lambda x, q, k: {**one, "sparsity": 1 - x}, 0, 1),
        (rectified, lambda x, q, k: {**one, "top_k": 1, "threshold": x}, 0, 1),
        (Oracle, lambda x, q, k: {**one, "is_causal": False, "top_k": count(x)}, 1, blocks),
    ]
    return [Contestant(system, True, *rest) for system, *rest in causal] + [
        Contestant(system, False, *rest) for system, *rest in bidirectional
    ]


def run(preset: Preset, out: Path) -> dict[str, Any]:
    """Compares the systems on the preset's dense models; writes comparison/study.json."""
    config = preset.comparison
    settings = {
        "comparison": dataclasses.asdict(config),
        "recall": to_dict(preset.recall),
        "language_model": to_dict(preset.language_model),
    }

    def measure() -> dict[str, Any]:
        plain = dataclasses.replace(preset.language_model.model, key_conv_width=0)
        trained = {
            "recall": train_variants(
                preset.recall, [dense(preset.recall.model)], preset.recall_seeds[:1], out, "recall", "accuracy", 1
            ),
            "language model": train_variants(
                preset.language_model,
                [dense(plain)],
                preset.language_model_seeds[:1],
                out,
                "language_model",
                "bits_per_byte",
                1,
            ),
        }
        runs = [(model, out / variant["runs"][0]) for model, (variant,) in trained.items()]
        compare = functools.partial(_compare, out=out, config=config)
        if preset.processes == 1:
            rows = [compare(*run) for run in runs]
        else:
            with ProcessPoolExecutor(len(runs), mp_context=multiprocessing.get_context("spawn")) as pool:
                rows = list(pool.map(compare, *zip(*runs, strict=True), share_cores(len(runs))))
        words = (
            f"Last layer without positions of the dense models, {config.batch_size} validation sequences of "
            f"{config.sequence_length} tokens, blocks of {config.block_size}, density {config.density}. Models "
            f"{'one after the other on all cores' if preset.processes == 1 else 'side by side, each on its cores'}."
        )
        top_k = max(1, round(config.density * config.sequence_length / config.block_size / 2))  # half the table is past
        query, key, _ = load_arrays(runs[-1][1], out, config)
        selection = moba.select(query, key, block_size=config.block_size, top_k=top_k)
        drawn = {"indices": selection.indices[:1].tolist(), "block_size": config.block_size}
        return {
            "setting": words,
            "rows": [row for of_model in rows for row in of_model],
            "selection": {**drawn, "num_blocks": selection.num_blocks},
        }

    return write_study(out, "comparison", preset.name, settings, measure)


def _compare(
    model: str, run_dir: Path, cores: Sequence[int] = (), *, out: Path, config: ComparisonConfig
) -> list[dict[str, Any]]:
    """The rows of one trained model, measured on these cores."""
    keep_to(cores)
    arrays = load_arrays(run_dir, out, config)
    rows = []
    for contestant in tqdm(contestants(config), desc=f"comparison, {model}", unit="system"):
        setting = find_setting(contestant, *arrays, config.density)
        about = {"model": model, "system": contestant.system.RECIPE.name, "is_causal": contestant.is_causal}
        rows.append({**about, "setting": setting, **measure_system(contestant, setting, *arrays, config.repeats)})
    return rows


def load_arrays(run_dir: Path, out: Path, config: ComparisonConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of the last layer without positions of a trained model, on validation data."""
    run_config, model = load_run(run_dir)
    data = dataclasses.replace(at_length(run_config.data, config.sequence_length), batch_size=config.batch_size)
    tokens = make_data(data, run_config.seed, out).batch(0, "validation")["tokens"]
    return attention_inputs(model, jnp.asarray(tokens))[-1]


def find_setting(contestant: Contestant, query: jax.Array, key: jax.Array, value: jax.Array, density: float) -> float:
    """The setting whose density is nearest to the one asked for, by bisection. Arrays as in `measure_system`."""
    low, high = contestant.low, contestant.high
    tried: list[tuple[float, float]] = []
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = exact_mask(contestant, middle, query, key, value)
        actual = found.sum() / visible_mask(query, key, contestant.is_causal).sum() / np.prod(found.shape[:2])
        tried.append((abs(actual - density), middle))
        low, high = (middle, high) if actual < density else (low, middle)
    return min(tried)[1]


def visible_mask(query: jax.Array, key: jax.Array, is_causal: bool) -> np.ndarray:
    """Who may see whom: bool `[queries, keys]`."""
    everything = np.ones((query.shape[1], key.shape[1]), bool)
    return np.tril(everything, key.shape[1] - query.shape[1]) if is_causal else everything


def exact_mask(
    contestant: Contestant, setting: float, query: jax.Array, key: jax.Array, value: jax.Array
) -> np.ndarray:
    """The pairs of tokens that a system attends exactly: bool `[batch, heads, queries, keys]`."""
    choice = _call(contestant.system.select, contestant.options(setting, query, key), query, key, value)
    choice, order = choice if isinstance(choice, tuple) else (choice, None)  # PBS-Attn gives the order of keys too
    mask = np.asarray(choice.to_mask())
    if isinstance(choice, LevelMap):
        mask = mask.repeat(choice.query_block_size, 2).repeat(choice.key_block_size, 3)
    else:
        mask = mask.repeat(choice.block_size, 3)
    mask = mask[:, :, : query.shape[1], : key.shape[1]]
    if order is not None:
        mask = np.take_along_axis(mask, np.argsort(order, axis=-1)[:, :, None], axis=3)
    return mask & visible_mask(query, key, contestant.is_causal)


def measure_system(
    contestant: Contestant, setting: float, query: jax.Array, key: jax.Array, value: jax.Array, repeats: int
) -> dict[str, float]:
    """One system beside dense attention.

    Args:
      contestant: the system.
      setting: of its dial.
      query: `[batch, tokens, heads, head_dim]`.
      key: `[batch, tokens, kv_heads, head_dim]`.
      value: shaped like key.
      repeats: calls that are timed.

    Returns:
      density: exactly attended pairs over visible pairs.
      mass_recall: share of dense attention's mass on the exactly attended pairs, mean over queries and heads.
      error: norm of (output - dense output) over the norm of dense output.
      select_ms, total_ms: median time of the choice alone and of the call.
    """
    system, options = contestant.system, contestant.options(setting, query, key)
    attend = jax.jit(lambda query, key, value: system.attention(query, key, value, **options))
    select = jax.jit(lambda *arrays: _call(system.select, options, *arrays))
    visible = visible_mask(query, key, contestant.is_causal)
    group = query.shape[2] // key.shape[2]
    logits = np.einsum("bthd,bshd->bhts", query, np.repeat(key, group, 2), dtype=np.float64) * query.shape[3] ** -0.5
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, np.repeat(value, group, 2))
    mask = exact_mask(contestant, setting, query, key, value)
    output = np.asarray(attend(query, key, value))

    def median_ms(function: Callable[..., Any]) -> float:
        jax.block_until_ready(function(query, key, value))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(function(query, key, value))
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    return {
        "density": float(mask.sum() / (visible.sum() * np.prod(mask.shape[:2]))),
        "mass_recall": float((weights * mask).sum(-1).mean()),
        "error": float(np.linalg.norm(output - expected) / np.linalg.norm(expected)),
        "select_ms": median_ms(select),
        "total_ms": median_ms(attend),
    }


def _call(select: Callable[..., Any], options: dict[str, Any], *arrays: jax.Array) -> Any:
    """A system's choice, by those of its options that concern the choice; some look at the values too."""
    parameters = inspect.signature(select).parameters
    options = {name: option for name, option in options.items() if name in parameters}
    return select(*arrays[: 3 if "value" in parameters else 2], **options)
