"""Finds kernel sizes on the device at hand, for the table of `tuning`.

One group of sizes after the other, each with the call that it decides: every combination of the group's values, the
sizes found so far kept. A candidate must first give the right results on a short sequence; what does not compile, or is
wrong, is passed over. At the end all calls are timed with the sizes found and with the default ones.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.config import TRITON, TritonConfig
from pallas_kernels.gpu.calls import is_right, make_arrays, make_calls, right_results, takes_choice
from pallas_kernels.gpu.roofline import Problem

Grid = tuple[tuple[str, dict[str, tuple[int, ...]]], ...]
Calls = Callable[[Problem, TritonConfig], dict[str, Callable[..., Any]]]

GRID: Grid = (
    ("route", {"route_queries": (64, 128), "route_blocks": (32, 64, 128), "route_warps": (4, 8)}),
    ("forward", {"tile_size": (64, 128), "key_size": (32, 64, 128), "attend_warps": (4, 8), "num_stages": (2, 3)}),
    ("forward_backward", {"key_size": (64, 128), "backward_tile_size": (32, 64, 128)}),
)
_CHECKED_TOKENS = 2048


def shortened(problem: Problem) -> Problem:
    """The problem at a length at which `right_results` can check it."""
    return dataclasses.replace(problem, batch=1, sequence=min(problem.sequence, _CHECKED_TOKENS))


def tune(
    problem: Problem, seconds: Callable[..., float], grid: Grid = GRID, make: Calls = make_calls
) -> tuple[TritonConfig, dict[str, float], dict[str, float]]:
    """The fastest sizes that give right results.

    Args:
      problem: what is timed.
      seconds: gives the time of a compiled call with its inputs.
      grid: calls of `make_calls`, and the values to try for the sizes that decide them.
      make: gives the calls for a problem and sizes.

    Returns:
      The sizes; milliseconds of each call of the grid with them; the same with the default sizes.
    """
    small = shortened(problem)
    small_arrays, arrays = make_arrays(small), make_arrays(problem)
    expected = right_results(small, small_arrays)
    indices = jax.jit(make(problem, TRITON)["route"])(arrays)

    @functools.cache
    def time(name: str, config: TritonConfig) -> float:
        inputs = (arrays, indices) if takes_choice(name) else (arrays,)
        return seconds(jax.jit(make(problem, config)[name]).lower(*inputs).compile(), *inputs)

    def checked_time(name: str, config: TritonConfig) -> float:
        inputs = (small_arrays, expected["route"]) if takes_choice(name) else (small_arrays,)
        try:
            if not is_right(jax.jit(make(small, config)[name])(*inputs), expected[name]):
                print(f"{problem}: {name} is wrong with {config}")
                return float("inf")
            return time(name, config)
        except Exception as error:  # a candidate may ask for more than the chip has
            print(f"{problem}: {name} fails with {config}: {str(error)[:200]}")
            return float("inf")

    best = TRITON
    for name, sizes in grid:
        combinations = [dict(zip(sizes, values, strict=True)) for values in itertools.product(*sizes.values())]
        candidates = [best, *(dataclasses.replace(best, **combination) for combination in combinations)]
        best = min(dict.fromkeys(candidates), key=functools.partial(checked_time, name))
    names = [name for name, _ in grid]
    return best, {name: 1e3 * time(name, best) for name in names}, {name: 1e3 * time(name, TRITON) for name in names}
