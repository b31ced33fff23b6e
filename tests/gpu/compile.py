"""Compiles every variant of the GPU kernels for an H100, without one: `make compile-gpu`, or in an environment with
`jax[cuda13]`, `python -m tests.gpu.compile [part of a name ...]`.

XLA, Triton and NVIDIA's assembler make machine code for sm_90 from the description of the chip beside this file. That
shows that a kernel can be compiled, that it fits the shared memory, and what the assembler has to complain about:

* registers spilled to memory. XLA has ptxas warn of them and logs its warnings to stderr when asked to; Mosaic prints
  the report of ptxas to stdout when asked to. Both are read.
* C7512: products of the tensor cores that wait for each other (wgmma serialised).

Either fails the run. A kernel made to spill comes first: if no warning of it arrives, none would arrive of others.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import mesh as mesh_lib  # AbstractDevice has no public name yet
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, SingleDeviceSharding

from pallas_kernels.blocks import Blocks
from pallas_kernels.config import TRITON, MosaicConfig
from pallas_kernels.gpu.mosaic import backward as mosaic_backward
from pallas_kernels.gpu.mosaic import forward as mosaic_forward
from pallas_kernels.gpu.triton import backward, decode, forward
from pallas_kernels.gpu.triton.routing import route
from tests.cases import abstract_blocks

TARGET = pathlib.Path(__file__).with_name("h100.txtpb")
_TOKENS, _HEADS, _KV_HEADS = 4096, 4, 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """A function to compile and the shapes of its arguments."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct


def route_variant(dtype: str, head_dim: int, block_size: int, top_k: int, **options: Any) -> Variant:
    """Causal routing."""
    query, key, blocks = _shapes(dtype, head_dim, block_size)

    def function(query, key, blocks):
        return route(query, key, blocks, top_k=top_k, is_causal=True, **options)

    name = f"route {dtype} head_dim={head_dim} block_size={block_size} top_k={top_k}"
    return Variant(name, function, (query, key, blocks))


def attend_variants(dtype: str, head_dim: int, block_size: int, top_k: int, **options: Any) -> tuple[Variant, Variant]:
    """The forward and the backward pass; options go to both, as `config` does, which says by which kernels."""
    query, key, blocks = _shapes(dtype, head_dim, block_size)
    indices = jax.ShapeDtypeStruct((1, _HEADS, _TOKENS, top_k), jnp.int32)
    numbers = jax.ShapeDtypeStruct((1, _TOKENS, _HEADS), jnp.float32)
    is_mosaic = isinstance(options.get("config"), MosaicConfig)
    passes = (mosaic_forward, mosaic_backward) if is_mosaic else (forward, backward)
    options = {"scale": 0.1} | options

    def run_forward(arrays, indices, blocks):
        return passes[0].attend_forward(arrays, indices, blocks, **options)

    def run_backward(arrays, indices, blocks, results, cotangents):
        return passes[1].attend_backward(arrays, indices, blocks, results, cotangents, **options)

    name = f"{dtype} head_dim={head_dim} block_size={block_size} top_k={top_k}"
    if is_mosaic:
        name += f" mosaic gather_in_kernel={options['config'].gather_in_kernel}"
    shapes, results = ((query, key, key), indices, blocks), (query, numbers)
    return (
        Variant(f"forward {name}", run_forward, shapes),
        Variant(f"backward {name}", run_backward, (*shapes, results, results)),
    )


def decode_variant(dtype: str, head_dim: int, block_size: int, top_k: int, group: int, queries: int) -> Variant:
    """A few new tokens and a cache."""

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    query = jax.ShapeDtypeStruct((1, queries, _KV_HEADS * group, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, _KV_HEADS, _TOKENS // block_size, block_size, head_dim), dtype)
    indices = numbers(1, _KV_HEADS * group, queries, top_k)
    name = f"decode {dtype} head_dim={head_dim} block_size={block_size} top_k={top_k} rows={group * queries}"
    shapes = (query, key, key), indices, numbers(1), numbers(1)
    return Variant(name, functools.partial(decode.attend, scale=0.1), shapes)


def _shapes(dtype: str, head_dim: int, block_size: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Blocks]:
    """Queries, keys and the geometry."""

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return (
        jax.ShapeDtypeStruct((1, _TOKENS, _HEADS, head_dim), dtype),
        jax.ShapeDtypeStruct((1, _TOKENS, _KV_HEADS, head_dim), dtype),
        abstract_blocks(numbers, _TOKENS, _TOKENS, block_size),
    )


def triton_variants() -> Iterator[Variant]:
    """Every dtype and width of a row, with blocks from 16 to 512 keys."""
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (64, 80, 128, 256):
            for top_k in (2, 8, 64):
                yield route_variant(dtype, head_dim, 64, top_k)
            for block_size, top_k in ((16, 64), (64, 16), (100, 8), (512, 2)):
                yield from attend_variants(dtype, head_dim, block_size, top_k)
            for block_size, top_k, group, queries in ((128, 8, 1, 1), (16, 64, 8, 4), (100, 8, 8, 16)):
                yield decode_variant(dtype, head_dim, block_size, top_k, group, queries)


def mosaic_variants() -> Iterator[Variant]:
    """Both widths of a row, blocks of one and of two warpgroups and cut ones, both gathers; no kernel twice."""
    for gather_in_kernel in (True, False):
        config = MosaicConfig(gather_in_kernel=gather_in_kernel)
        for dtype in ("bfloat16", "float16"):
            for head_dim in (64, 128):
                for block_size, top_k in ((64, 16), (128, 8), (512, 4)):
                    yield from attend_variants(dtype, head_dim, block_size, top_k, config=config)


def spilling_variant() -> Variant:
    """Four warps have no room for these tiles."""
    config = dataclasses.replace(TRITON, tile_size=256, attend_warps=4)
    return attend_variants("bfloat16", 128, 256, 8, config=config)[0]


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Tracing inside sees an H100, which tells Pallas what to lower for."""
    device = mesh_lib.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("d",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@functools.cache  # shardings over two descriptions of one device do not mix
def _sharding() -> SingleDeviceSharding:
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    return SingleDeviceSharding(topology.devices[0])


def complaints(variant: Variant) -> list[str]:
    """Compiles a variant; the lines of the assembler on spilled registers and serialised products."""
    sharding = _sharding()
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    shapes = jax.tree.map(lambda x: place(x.shape, x.dtype), variant.shapes)
    compiled = jax.jit(variant.function, in_shardings=sharding, out_shardings=sharding)
    with _output() as read, h100():
        compiled.lower(*shapes).compile()
        report = read()
    if "mosaic" in variant.name and "bytes spill stores" not in report:
        return ["no report of ptxas: this jax gives it in another way"]
    spills = re.compile(r"[1-9]\d* bytes spill")
    return [line.strip() for line in report.splitlines() if spills.search(line) or "C7512" in line]


@contextlib.contextmanager
def _output() -> Iterator[Callable[[], str]]:
    """Catches what the process writes to stdout and stderr, C++ included; gives a function that returns it."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)

    flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with tempfile.TemporaryFile() as caught:
        for number in kept:
            os.dup2(caught.fileno(), number)
        try:

            def read() -> str:
                flush()
                caught.seek(0)
                return caught.read().decode(errors="replace")

            yield read
        finally:
            flush()
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


def main() -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"  # read when the CUDA plug-in is loaded, later
    os.environ["TF_CPP_VMODULE"] = "ptx_compiler_helpers=3"
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    jax.config.update("jax_platforms", "cpu")
    if not complaints(spilling_variant()):
        sys.exit("no warning of a kernel that is made to spill registers: this jax reports them in another way")
    failed = 0
    for variant in itertools.chain(mosaic_variants(), triton_variants()):
        if not all(part in variant.name for part in sys.argv[1:]):
            continue
        start = time.perf_counter()
        try:
            lines = complaints(variant)
        except Exception as error:  # the others are compiled all the same
            lines = [f"{type(error).__name__}: {str(error)[:500]}"]
        failed += bool(lines)
        print(f"{'FAILED' if lines else 'ok'} {variant.name} {time.perf_counter() - start:.1f} s", *lines, sep="\n  ")
    if failed:
        sys.exit(f"{failed} variants failed")


if __name__ == "__main__":
    main()
