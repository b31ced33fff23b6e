"""What the XLA path becomes on an H100: kernels, loop iterations and memory, read from the compiled program.

`make compile-gpu`, or in an environment with `jax[cuda13]`, `python -m tests.gpu.xla_path [tokens]`. Fails on a loop
whose length the program does not know, for after each of its steps the GPU would ask the host, and on more iterations
than promised at 64K tokens. `tests/test_loops.py` counts the same before XLA compiles.

At 64K tokens, jax 0.12; in brackets what it was with the steps of a CPU and more heads side by side, where loops of
unknown length, entered each time the loop around them turns, count as one iteration:

                          kernels        iterations             temporary
    route                 103 (584)      16 (64, one unknown)   1.3 GiB (0.6)
    forward               1199 (1703)    48 (132, two unknown)  2.7 GiB (3.2)
    forward and backward  2327 (2892)    80 (200, three)        4.4 GiB (4.5)
"""

import functools
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

import sparse_attn
from tests.gpu.compile import _sharding, h100

OPTIONS = {"block_size": 128, "top_k": 8, "is_causal": True, "implementation": "xla"}
MOST = {"route": 64, "forward": 64, "forward and backward": 128}  # iterations at 64K tokens
_KERNEL = re.compile(r" (fusion|custom-call|sort|scatter|gather|dot|copy|copy-start)\(")


class Work(NamedTuple):
    """What runs when a program runs once."""

    kernels: int
    iterations: int
    unknown: int  # loops whose length is not known


def count(text: str) -> Work:
    """Reads the text of a compiled program."""
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            lines[name] = []
            entry = name if head[1] else entry
        elif name:
            lines[name].append(line)

    @functools.cache
    def count_in(name: str) -> Work:
        kernels = iterations = unknown = 0
        for line in lines[name]:
            if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                inside, known = count_in(body[1]), re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                times = int(known[1]) if known else 1
                kernels += times * inside.kernels
                iterations += times * (1 + inside.iterations)
                unknown += inside.unknown + (known is None)
            elif called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                inside = count_in(called[1])
                kernels, iterations = kernels + inside.kernels, iterations + inside.iterations
                unknown += inside.unknown
            else:
                kernels += bool(_KERNEL.search(line))
        return Work(kernels, iterations, unknown)

    return count_in(entry)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 65536
    sharding = _sharding()
    shape = jax.ShapeDtypeStruct((2, tokens, 16, 128), jnp.bfloat16, sharding=sharding)
    attend = functools.partial(sparse_attn.moba_attention, **OPTIONS)

    def differentiate(*arrays):
        return jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    calls = {
        "route": lambda query, key, _: sparse_attn.route_moba(query, key, **OPTIONS).indices,
        "forward": attend,
        "forward and backward": differentiate,
    }
    failed = False
    for name, function in calls.items():
        with h100():
            lowered = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*[shape] * 3)
        compiled = lowered.compile()
        work, memory = count(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes / 2**20
        is_wrong = work.unknown > 0 or (tokens == 65536 and work.iterations > MOST[name])
        print(
            f"{'FAILED' if is_wrong else 'ok'} {name}, {tokens} tokens: {work}, temporary {memory:.0f} MiB", flush=True
        )
        failed |= is_wrong
    sys.exit(failed)


if __name__ == "__main__":
    main()
