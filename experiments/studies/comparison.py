"""Which system keeps most of attention at an equal number of attended pairs?

Queries, keys and values are those of the last attention layer without positions of the dense models of the block_size
and language_model studies, on validation data: one recalls and looks at few keys, the other writes text and looks at
many. Every system gets the setting that brings its density (exactly attended pairs over visible pairs) nearest to the
target, and is measured against dense attention. Systems for text are compared under a causal mask, those for images and
video without one: two leagues, each with an oracle that knows the true mass of every pair of blocks.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.config import to_dict
from experiments.data import make_data
from experiments.evaluate import at_length
from experiments.studies.snr import attention_inputs
from experiments.studies.variants import dense, train_variants, write_study
from experiments.train import load_run
from sparse_attn.grammar import choose, score
from sparse_attn.selection import BlockSelection, LevelMap
from sparse_attn.systems import moba, pisa, vmoba
from sparse_attn.systems.recipe import Recipe
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility

if TYPE_CHECKING:
    from experiments.configs import Preset

_STEPS = 7  # of the bisection over a setting


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """At which sizes the systems are compared."""

    density: float = 0.25
    """Exactly attended pairs over visible pairs, the target (a share)."""
    sequence_length: int = 512
    """Length of the validation sequences (tokens)."""
    batch_size: int = 2
    """Sequences (sequences)."""
    block_size: int = 32
    """Keys in a block, and queries in a block where systems choose for blocks of queries (tokens)."""
    repeats: int = 5
    """Measurements of each time (calls)."""


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
            mass += jnp.eye(*mass.shape[-2:]) * block_size
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
    """A system with one dial: `options(setting)` are its keywords, and its density grows from `low` to `high`."""

    system: ModuleType | type[Oracle]
    is_causal: bool
    options: Callable[[float], dict[str, Any]]
    low: float
    high: float


def contestants(config: ComparisonConfig) -> list[Contestant]:
    """Every system that needs no trained parts of its own. The numbers of blocks are dialled as real numbers."""
    blocks, size = -(-config.sequence_length // config.block_size), config.block_size

    def count(setting: float) -> int:
        return max(1, round(setting))

    return [
        Contestant(moba, True, lambda x: {"block_size": size, "top_k": count(x)}, 1, blocks),
        Contestant(Oracle, True, lambda x: {"block_size": size, "top_k": count(x), "is_causal": True}, 1, blocks),
        Contestant(Oracle, False, lambda x: {"block_size": size, "top_k": count(x), "is_causal": False}, 1, blocks),
        Contestant(
            vmoba,
            False,
            lambda x: {"grid_shape": (config.sequence_length, 1, 1), "box_shape": (size,), "threshold": x},
            0,
            1,
        ),
        Contestant(pisa, False, lambda x: {"block_size": size, "density": x}, 0, 1),
    ]


def run(preset: "Preset", out: Path) -> dict[str, Any]:
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
        rows = []
        for model, (variant,) in trained.items():
            arrays = load_arrays(out, variant["runs"][0], config)
            for contestant in tqdm(contestants(config), desc=f"comparison, {model}", unit="system"):
                setting = find_setting(contestant, *arrays, config.density)
                about = {"model": model, "system": contestant.system.RECIPE.name, "is_causal": contestant.is_causal}
                measured = measure_system(contestant, setting, *arrays, config.repeats)
                rows.append({**about, "setting": setting, **measured})
        words = (
            f"Last layer without positions of the dense models, {config.batch_size} validation sequences of "
            f"{config.sequence_length} tokens, blocks of {config.block_size}, density {config.density}."
        )
        return {"setting": words, "rows": rows}

    return write_study(out, "comparison", preset.name, settings, measure)


def load_arrays(out: Path, directory: str, config: ComparisonConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value of the last layer without positions of a trained model, on validation data."""
    run_config, model = load_run(out / directory)
    data = dataclasses.replace(at_length(run_config.data, config.sequence_length), batch_size=config.batch_size)
    return attention_inputs(model, make_data(data, run_config.seed, out).batch(0, "validation")["tokens"])[-1]


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
    """The pairs of tokens that a system attends exactly: bool `[batch, heads, queries, keys]`.

    The keys stand in the order in which the system put them.
    """
    choice = _call(contestant.system.select, contestant.options(setting), query, key, value)
    mask = np.asarray(choice.to_mask())
    if isinstance(choice, BlockSelection):
        mask = mask.repeat(choice.block_size, 3)
    else:
        mask = mask.repeat(choice.query_block_size, 2).repeat(choice.key_block_size, 3)
    return mask[:, :, : query.shape[1], : key.shape[1]] & visible_mask(query, key, contestant.is_causal)


def attention_matrix(attention: Callable[..., jax.Array], query: jax.Array, key: jax.Array) -> np.ndarray:
    """The weight that each query gives each key, `[batch, heads, queries, keys]`: attention to unit vectors as values.

    Any system whose output is linear in the values can be looked into so, whatever it does with order and blocks.
    """
    batch, num_keys, kv_heads, head_dim = key.shape
    units = jnp.eye(-(-num_keys // head_dim) * head_dim)[:num_keys].reshape(num_keys, -1, head_dim)

    @jax.jit
    def probe(query: jax.Array, key: jax.Array) -> jax.Array:
        def attend(unit: jax.Array) -> jax.Array:  # [keys, head_dim]
            value = jnp.broadcast_to(unit[None, :, None], (batch, num_keys, kv_heads, head_dim))
            return attention(query, key, value.astype(key.dtype))

        return jax.lax.map(attend, units.swapaxes(0, 1))  # [parts, batch, queries, heads, head_dim]

    weights = np.moveaxis(np.asarray(probe(query, key)), 0, 3)  # [batch, queries, heads, parts, head_dim]
    return weights.reshape(*weights.shape[:3], -1)[..., :num_keys].swapaxes(1, 2)


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
    system, options = contestant.system, contestant.options(setting)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return system.attention(query, key, value, **options)

    visible = visible_mask(query, key, contestant.is_causal)
    group = query.shape[2] // key.shape[2]
    logits = np.einsum("bthd,bshd->bhts", query, np.repeat(key, group, 2), dtype=np.float64) * query.shape[3] ** -0.5
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, np.repeat(value, group, 2))
    if system.RECIPE.rest == "drop":
        mask = attention_matrix(attend, query, key) > 0
    else:  # what stands in for the rest gives every key some weight
        mask = exact_mask(contestant, setting, query, key, value)
    output = np.asarray(jax.jit(attend)(query, key, value))

    def median_ms(function: Callable[..., Any]) -> float:
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(query, key, value))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(query, key, value))
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    return {
        "density": float(mask.sum() / (visible.sum() * np.prod(mask.shape[:2]))),
        "mass_recall": float((weights * mask).sum(-1).mean()),
        "error": float(np.linalg.norm(output - expected) / np.linalg.norm(expected)),
        "select_ms": median_ms(lambda *arrays: _call(system.select, options, *arrays)),
        "total_ms": median_ms(attend),
    }


def _call(select: Callable[..., Any], options: dict[str, Any], *arrays: jax.Array) -> Any:
    """A system's choice; some look at the values too."""
    takes_values = "value" in select.__code__.co_varnames[: select.__code__.co_argcount]
    return select(*arrays[: 3 if takes_values else 2], **options)
