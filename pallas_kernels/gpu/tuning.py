"""The table of measured kernel sizes: what the GPU kernels take where a call names none.

`tuning.json` keeps, for a device, a head_dim, a block_size and a top_k, the fastest of the sizes that were tried, their
times, those of the default sizes, the date and the version of JAX. `python -m pallas_kernels.gpu.on_device --tune`
measures and writes it. Sizes are those of 16-bit rows; `TritonConfig.for_rows` makes them smaller for float32.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from pallas_kernels.config import TRITON, TritonConfig

TABLE = pathlib.Path(__file__).with_name("tuning.json")
_KEY = ("device", "head_dim", "block_size", "top_k")
_FIELDS = (*_KEY, "config", "sequence", "milliseconds", "default_milliseconds", "date", "jax")


def tuned(head_dim: int, block_size: int, top_k: int) -> TritonConfig:
    """The sizes of the table for the device at hand, the default ones where it has no entry."""
    return read_sizes(TABLE).get((jax.devices()[0].device_kind, head_dim, block_size, top_k), TRITON)


@functools.cache
def read_sizes(path: pathlib.Path) -> dict[tuple[str, int, int, int], TritonConfig]:
    """Sizes by device, head_dim, block_size and top_k.

    Raises:
      ValueError: an entry that lacks something or has too much, is there twice, or whose sizes cannot be.
    """
    sizes = {}
    for entry in read_entries(path):
        if set(entry) != set(_FIELDS):
            raise ValueError(f"{path}: an entry has the fields {', '.join(_FIELDS)}, got {entry}")
        key = _key(entry)
        if key in sizes:
            raise ValueError(f"{path}: two entries for {key}")
        try:
            sizes[key] = TritonConfig(**entry["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: sizes for {key}: {error}") from error
    return sizes


def read_entries(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of a table as they stand in the file."""
    return json.loads(path.read_text())["entries"]


def write_entry(path: pathlib.Path, entry: dict[str, Any]) -> None:
    """Puts an entry into a table, in the place of an older one for the same problem on the same device."""
    others = [other for other in read_entries(path) if _key(other) != _key(entry)]
    entries = sorted([*others, entry], key=_key)
    about = f"{len(entries)} measured problems. Written by python -m pallas_kernels.gpu.on_device --tune"
    path.write_text(json.dumps({"about": about, "entries": entries}, indent=1) + "\n")


def make_entry(config: TritonConfig, **fields: Any) -> dict[str, Any]:
    """An entry of the table; of the sizes, those that are not the default ones."""
    default = dataclasses.asdict(TRITON)
    changed = {name: size for name, size in dataclasses.asdict(config).items() if size != default[name]}
    return {**fields, "config": changed}


def _key(entry: dict[str, Any]) -> tuple[str, int, int, int]:
    device, head_dim, block_size, top_k = (entry[name] for name in _KEY)
    return device, head_dim, block_size, top_k
