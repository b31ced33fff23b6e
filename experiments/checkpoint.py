"""Orbax checkpoints that are whole and of this very run, or an error that says what is wrong with them.

Every process of a run calls these functions, with the same arguments, on a directory that all of them see. Each writes
and reads what its own devices hold; no array is gathered.
"""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from jax.typing import ArrayLike

log = logging.getLogger(__name__)

# Orbax writes into a directory of such a name and renames it when it is whole; `save` renames before it deletes.
_UNFINISHED = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleted)")

_ADVICE = "Delete this directory to go on from the checkpoint before it, or from the start if there is none."


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another run."""


def save(directory: Path, step: int, state: Any, fingerprint: str, seconds: float, keep: int) -> None:
    """Writes a checkpoint of finite numbers, all or nothing, then deletes all but the newest ones.

    Args:
      directory: where a run's checkpoints are; the checkpoint becomes directory/step.
      step: optimizer steps done.
      state: any pytree of arrays, split over devices as they like.
      fingerprint: of the run's configuration and data.
      seconds: training time so far.
      keep: how many checkpoints stay.

    Raises:
      FloatingPointError: a number of the state is not finite; nothing was written or deleted.
    """
    arrays = {name: jnp.asarray(leaf) for name, leaf in named_leaves(state).items()}
    checksums, strange = _summarize(arrays)
    require_finite(directory, step, strange)
    described = {name: [describe(array), checksums[name]] for name, array in arrays.items()}
    about = {"fingerprint": fingerprint, "step": step, "seconds": seconds, "arrays": described}
    with _checkpointer() as checkpointer:
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        checkpointer.save(directory.absolute() / str(step), items)
    for old in _steps(directory)[:-keep] if jax.process_index() == 0 else ():
        doomed = directory / f"{old}.deleted"
        (directory / str(old)).rename(doomed)
        shutil.rmtree(doomed)


def require_finite(directory: Path, step: int, numbers: Mapping[str, ArrayLike]) -> None:
    """Raises FloatingPointError if a number is NaN or infinite; its message names the newest checkpoint.

    Args:
      directory: where a run's checkpoints are.
      step: optimizer steps done.
      numbers: by their names.
    """
    if strange := _not_finite(numbers):
        steps = _steps(directory)
        newest = f"the last good checkpoint is {directory / str(steps[-1])}" if steps else "there is no checkpoint yet"
        raise FloatingPointError(f"{strange} at step {step}; {newest}")


def restore(directory: Path, template: Any, fingerprint: str) -> tuple[int, Any, float] | None:
    """Reads the newest checkpoint.

    What a killed run left of a checkpoint that it was still writing is deleted, and the log says so: such a directory
    was never committed, and the checkpoint before it is whole.

    Args:
      directory: where a run's checkpoints are.
      template: pytree of `jax.ShapeDtypeStruct`s of the structure that was saved. Their shardings say which devices get
        what, however it was split when it was saved; without, that is the first device.
      fingerprint: of the run's configuration and data.

    Returns:
      The step, the state and the training time so far (seconds); None if there is no checkpoint.

    Raises:
      CheckpointError: the newest checkpoint is damaged, not finite or of another run, or something else lies in the
        directory.
    """
    entries = directory.iterdir() if directory.exists() and jax.process_index() == 0 else ()
    for entry in sorted(entries):
        if _UNFINISHED.fullmatch(entry.name):
            log.warning("removing %s: a run was stopped before this checkpoint was whole", entry)
            shutil.rmtree(entry)
        elif not (entry.name.isdecimal() and entry.is_dir()):
            raise CheckpointError(f"{directory} must hold checkpoints alone, got {entry.name!r}; move it elsewhere")
    multihost_utils.sync_global_devices("unfinished checkpoints are removed")
    if not (steps := _steps(directory)):
        return None
    path = directory.absolute() / str(steps[-1])
    expected = named_leaves(template)
    try:
        with _checkpointer() as checkpointer:
            about = checkpointer.restore(path, ocp.args.Composite(about=ocp.args.JsonRestore())).about
            if about["fingerprint"] != fingerprint:
                raise CheckpointError(
                    f"{path} was written by a run of another configuration or of other data (its fingerprint is "
                    f"{about['fingerprint'][:12]}, this run's is {fingerprint[:12]}); use another run_dir"
                )
            described = about.get("arrays", {})
            if about["step"] != steps[-1] or set(described) != set(expected):
                raise CheckpointError(f"{path} is of another model or version, or was renamed; use another run_dir")
            for name, leaf in expected.items():
                if described[name][0] != describe(leaf):
                    raise CheckpointError(f"{path} is of another model: {name} is {described[name][0]} there")
            first = SingleDeviceSharding(jax.local_devices()[0])
            places = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first)
                for name, leaf in expected.items()
            }
            arrays = checkpointer.restore(path, ocp.args.Composite(state=ocp.args.StandardRestore(places))).state
        checksums, strange = _summarize(arrays)
        for name, checksum in checksums.items():
            if described[name][1] != checksum:
                raise OSError(f"the checksum of {name} is wrong")
        if found := _not_finite(strange):
            raise CheckpointError(f"{path} cannot be gone on from: {found}\n{_ADVICE}")
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds; every one means that the files are not whole
        # Orbax adds pages about the array; what went wrong is the cause.
        raise CheckpointError(f"{path} is damaged: {error.__cause__ or error}\n{_ADVICE}") from error
    # Without a sharding, arrays are not bound to a device, as those that `jax.jit` makes.
    leaves = [
        arrays[name] if leaf.sharding else jnp.asarray(np.asarray(arrays[name])) for name, leaf in expected.items()
    ]
    return steps[-1], jax.tree.unflatten(jax.tree.structure(template), leaves), about["seconds"]


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _steps(directory: Path) -> list[int]:
    entries = directory.iterdir() if directory.exists() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their paths, such as "params.layers.0.bias"."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def describe(array: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Dtype and shape, such as "float32[3, 4]"."""
    return f"{array.dtype}{list(array.shape)}"


def _not_finite(numbers: Mapping[str, ArrayLike]) -> str | None:
    """Which number is the first that is NaN or infinite, in words."""
    return next((f"{name} is {number}" for name, number in numbers.items() if not np.isfinite(number)), None)


def _summarize(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, int], dict[str, float]]:
    """Of each array, by its name: its checksum, and the sum of its numbers that are not finite (0 if all are)."""
    # One at a time: CPU devices that wait for each other in many programs at once can run out of threads.
    summaries = {name: jax.device_get(_summary(array)) for name, array in arrays.items()}
    checksums = {name: int(checksum) for name, (checksum, _) in summaries.items()}
    return checksums, {f"a number of {name}": float(strange) for name, (_, strange) in summaries.items()}


@jax.jit
def _summary(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Checksum uint32 [] and sum of what is not finite float32 [], reduced where the array lies.

    The checksum is sum_i mix(bits_i xor mix(i)) modulo 2^32, which is the same in any order, hence however the array is
    split. bits_i are the bits of element i, and mix is a bijection: a change of any one element changes the sum, any
    other change does but for chance.
    """

    def mix(bits: jax.Array) -> jax.Array:
        """Multiplications and shifts after the finaliser of MurmurHash3 (Austin Appleby, public domain)."""
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * np.uint32(factor)
        return bits ^ (bits >> 16)

    width = min(array.dtype.itemsize, 4)  # elements of 8 bytes become two of 4
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * width}").astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    strange = jnp.where(jnp.isfinite(array), 0, array).sum()
    return mix(bits ^ mix(index)).sum(dtype=jnp.uint32), strange.astype(jnp.float32)
