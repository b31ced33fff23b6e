"""Which system keeps most of attention at an equal number of attended pairs?

Queries, keys and values are those of the last attention layer without positions of the dense models of the block_size
and language_model studies, on validation data: one recalls and looks at few keys, the other writes text and looks at
many. Every system gets the setting that brings its density (exactly attended pairs over visible pairs) nearest to the
target, and is measured against dense attention. Systems for text are compared under a causal mask, those for images and
video without one: two leagues, each with an oracle that knows the true mass of every pair of blocks.
"""

import dataclasses
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.config import to_dict
from experiments.data import make_data
from experiments.evaluate import at_length
from experiments.preset import ComparisonConfig, Preset
from experiments.studies.snr import attention_inputs
from experiments.studies.variants import dense, keep_to, share_cores, train_variants, write_study
from experiments.train import load_run
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import whole_rows
from sparse_attn.selection import BlockSelection, LevelMap
from sparse_attn.systems.adaspa import AdaSpa
from sparse_attn.systems.bsfa import BSFA
from sparse_attn.systems.infllm_v2 import InfLLMv2
from sparse_attn.systems.moba import MoBA
from sparse_attn.systems.pbs_attention import PBSAttention
from sparse_attn.systems.pisa import PISA
from sparse_attn.systems.prism import Prism
from sparse_attn.systems.proxy_attention import ProxyAttention
from sparse_attn.systems.psa import PSA
from sparse_attn.systems.rectified import RectifiedSpaAttn
from sparse_attn.systems.sale import SALE
from sparse_attn.systems.sla import SLA
from sparse_attn.systems.system import System
from sparse_attn.systems.vmoba import VMoBA
from sparse_attn.systems.xattention import XAttention

_STEPS = 5  # of the bisection over a setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(System):
    """For every query block the key blocks of largest true attention mass: what choosing per tile can reach at best.

    Attributes:
      top_k: blocks that a query block attends; causal, the diagonal is one of them.
      block_size: tokens in a block.
      is_causal: whether a query sees only keys up to its own position.
    """

    top_k: int
    block_size: int
    is_causal: bool

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        block_size, scale = self.block_size, self.factor(query)
        blocks = whole_rows(query, key, block_size=block_size, is_causal=self.is_causal)
        everything = jnp.ones((query.shape[0], query.shape[2], *(-(-x.shape[1] // block_size) for x in (query, key))))
        full = LevelMap(everything.astype(jnp.int8), block_size, block_size)
        log_sum_exp = attend_levels(query, key, key, full, blocks, scale=scale).log_sum_exp()
        sizes = {"query_block_size": block_size, "key_block_size": block_size}
        mass = score.exact_blocks(query, key, blocks, **sizes, scale=scale, log_sum_exp=log_sum_exp)
        if self.is_causal:
            mass += jnp.eye(mass.shape[-2], mass.shape[-1]) * block_size
        chosen = choose.top_k(jnp.where(mass > 0, mass, -jnp.inf), self.top_k)
        return LevelMap(chosen.astype(jnp.int8), block_size, block_size)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A system at one setting, with the arrays that it takes besides query, key and value."""

    system: Any
    of_choice: tuple[Any, ...] = ()  # after key in `select`
    of_call: tuple[Any, ...] = ()  # after value in the call

    def select(self, query: jax.Array, key: jax.Array) -> LevelMap | BlockSelection:
        """The choice."""
        return self.system.select(query, key, *self.of_choice)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """The output."""
        return self.system(query, key, value, *self.of_call)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A system with one dial: bind(setting, query, key) is the system at a setting; density grows from low to high."""

    name: str
    is_causal: bool
    bind: Callable[[float, jax.Array, jax.Array], Bound]
    low: float = 0.0
    high: float = 1.0


def contestants(config: ComparisonConfig) -> list[Contestant]:
    """Every system that chooses by itself, without trained parts: x is the dial, of which counts are rounded.

    BSFA's thresholds are calibrated on the very sequences it is measured on, and SLA's linear branch is switched off by
    its untrained projection.
    """
    size, blocks = config.block_size, -(-config.sequence_length // config.block_size)
    both: dict[str, Any] = {"query_block_size": size, "key_block_size": size}
    one: dict[str, Any] = {"block_size": size}

    def count(x: float) -> int:
        return max(1, round(x))

    def plain(make: Callable[[float], Any]) -> Callable[[float, jax.Array, jax.Array], Bound]:
        return lambda x, query, key: Bound(make(x))

    def prism(x: float, query: jax.Array, key: jax.Array) -> Bound:
        high, low = query.shape[3] // 2, 3 * query.shape[3] // 4
        return Bound(Prism(**one, high_size=high, low_size=low, high_threshold=x, low_threshold=x))

    def bsfa(x: float, query: jax.Array, key: jax.Array) -> Bound:
        thresholds = BSFA(**both).calibrate(query, key, top_k=count(x))
        return Bound(BSFA(**both), (thresholds,), (thresholds,))

    def psa(x: float, query: jax.Array, key: jax.Array) -> Bound:
        first, second, third, fourth = (min(1.0, x + more) for more in (0.0, 0.1, 0.2, 0.4))
        system = PSA(**both, bounds=(first, second, third, fourth))
        offsets = system.draw_offsets(jax.random.key(0), query, key)
        return Bound(system, (offsets,), (offsets,))

    def sla(x: float, query: jax.Array, key: jax.Array) -> Bound:
        head_dim = query.shape[3]
        return Bound(SLA(**both, density=x), (), (jnp.zeros((head_dim, head_dim)), jnp.zeros(head_dim)))

    pools: dict[str, Any] = {
        "pool_size": size // 2,
        "pool_stride": size // 4,
        "initial_blocks": 1,
        "local_blocks": 0,
        "dense_length": 1,
    }
    sale_sizes: dict[str, Any] = {**both, "local_window": size, "dense_length": 1}
    line: dict[str, Any] = {"grid_shape": (config.sequence_length, 1, 1), "box_shape": (size,)}
    return [
        Contestant("MoBA", True, plain(lambda x: MoBA(**one, top_k=count(x))), 1, blocks),
        Contestant("InfLLM-v2", True, plain(lambda x: InfLLMv2(**one, **pools, top_k=count(x))), 1, blocks),
        Contestant("XAttention", True, plain(lambda x: XAttention(**one, stride=size // 4, threshold=x))),
        Contestant("Prism", True, prism),
        Contestant("PBS-Attn", True, plain(lambda x: PBSAttention(**one, segment_size=2 * size, threshold=x))),
        Contestant("ProxyAttn", True, plain(lambda x: ProxyAttention(**one, min_tokens=1, mass=x))),
        Contestant("BSFA", True, bsfa, 1, blocks),
        Contestant("SALE", True, plain(lambda x: SALE(**sale_sizes, threshold=10 ** (2 - 8 * x)))),
        Contestant("oracle", True, plain(lambda x: Oracle(**one, is_causal=True, top_k=count(x))), 1, blocks),
        Contestant("VMoBA", False, plain(lambda x: VMoBA(**line, threshold=x))),
        Contestant("PSA", False, psa),
        Contestant("PISA", False, plain(lambda x: PISA(**one, density=x))),
        Contestant("SLA", False, sla),
        Contestant("AdaSpa", False, plain(lambda x: AdaSpa(**one, sparsity=1 - x))),
        Contestant("Rectified SpaAttn", False, plain(lambda x: RectifiedSpaAttn(**one, top_k=1, threshold=x))),
        Contestant("oracle", False, plain(lambda x: Oracle(**one, is_causal=False, top_k=count(x))), 1, blocks),
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
        selection = MoBA(block_size=config.block_size, top_k=top_k).select(query, key)
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
        setting = find_setting(contestant, *arrays[:2], config.density)
        about = {"model": model, "system": contestant.name, "is_causal": contestant.is_causal}
        rows.append({**about, "setting": setting, **measure_system(contestant, setting, *arrays, config.repeats)})
    return rows


def load_arrays(run_dir: Path, out: Path, config: ComparisonConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of the last layer without positions of a trained model, on validation data."""
    run_config, model = load_run(run_dir)
    data = dataclasses.replace(at_length(run_config.data, config.sequence_length), batch_size=config.batch_size)
    tokens = make_data(data, run_config.seed, out).batch(0, "validation")["tokens"]
    return attention_inputs(model, jnp.asarray(tokens))[-1]


def find_setting(contestant: Contestant, query: jax.Array, key: jax.Array, density: float) -> float:
    """The setting whose density is nearest to the one asked for, by bisection. Arrays as in `measure_system`."""
    low, high = contestant.low, contestant.high
    tried: list[tuple[float, float]] = []
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = exact_mask(contestant, middle, query, key)
        actual = found.sum() / visible_mask(query, key, contestant.is_causal).sum() / np.prod(found.shape[:2])
        tried.append((abs(actual - density), middle))
        low, high = (middle, high) if actual < density else (low, middle)
    return min(tried)[1]


def visible_mask(query: jax.Array, key: jax.Array, is_causal: bool) -> np.ndarray:
    """Who may see whom: bool `[queries, keys]`."""
    everything = np.ones((query.shape[1], key.shape[1]), bool)
    return np.tril(everything, key.shape[1] - query.shape[1]) if is_causal else everything


def exact_mask(contestant: Contestant, setting: float, query: jax.Array, key: jax.Array) -> np.ndarray:
    """The pairs of tokens that a system attends exactly: bool `[batch, heads, queries, keys]`."""
    choice = contestant.bind(setting, query, key).select(query, key)
    mask = np.asarray(choice.to_mask())
    if isinstance(choice, LevelMap):
        mask = mask.repeat(choice.query_block_size, 2).repeat(choice.key_block_size, 3)
    else:
        mask = mask.repeat(choice.block_size, 3)
    mask = mask[:, :, : query.shape[1], : key.shape[1]]
    if isinstance(choice, LevelMap) and choice.key_order is not None:
        mask = np.take_along_axis(mask, np.argsort(choice.key_order, axis=-1)[:, :, None], axis=3)
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
    system = contestant.bind(setting, query, key)
    attend, select = jax.jit(lambda *arrays: system(*arrays)), jax.jit(lambda *arrays: system.select(*arrays[:2]))
    visible = visible_mask(query, key, contestant.is_causal)
    group = query.shape[2] // key.shape[2]
    logits = np.einsum("bthd,bshd->bhts", query, np.repeat(key, group, 2), dtype=np.float64) * query.shape[3] ** -0.5
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, np.repeat(value, group, 2))
    mask = exact_mask(contestant, setting, query, key)
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
