"""Orbax checkpoints that are whole and of this very run, or an error that says what is wrong with them."""

import json
import logging
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
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
      state: any pytree of arrays.
      fingerprint: of the run's configuration and data.
      seconds: training time so far.
      keep: how many checkpoints stay.

    Raises:
      FloatingPointError: a number of the state is not finite; nothing was written or deleted.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    require_finite(directory, step, arrays)
    about = {"fingerprint": fingerprint, "step": step, "seconds": seconds, "checksums": _checksums(arrays)}
    with _checkpointer() as checkpointer:
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        checkpointer.save(directory.absolute() / str(step), items)
    for old in _steps(directory)[:-keep]:
        doomed = directory / f"{old}.deleted"
        (directory / str(old)).rename(doomed)
        shutil.rmtree(doomed)


def require_finite(directory: Path, step: int, arrays: Mapping[str, ArrayLike]) -> None:
    """Raises FloatingPointError if a number is NaN or infinite; its message names the newest checkpoint.

    Args:
      directory: where a run's checkpoints are.
      step: optimizer steps done.
      arrays: numbers or arrays by their names.
    """
    if strange := _not_finite(arrays):
        steps = _steps(directory)
        newest = f"the last good checkpoint is {directory / str(steps[-1])}" if steps else "there is no checkpoint yet"
        raise FloatingPointError(f"{strange} at step {step}; {newest}")


def restore(directory: Path, template: Any, fingerprint: str) -> tuple[int, Any, float] | None:
    """Reads the newest checkpoint.

    What a killed run left of a checkpoint that it was still writing is deleted, and the log says so: such a directory
    was never committed, and the checkpoint before it is whole.

    Args:
      directory: where a run's checkpoints are.
      template: pytree of arrays or `jax.ShapeDtypeStruct`s, of the structure that was saved.
      fingerprint: of the run's configuration and data.

    Returns:
      The step, the state and the training time so far (seconds); None if there is no checkpoint.

    Raises:
      CheckpointError: the newest checkpoint is damaged, not finite or of another run, or something else lies in the
        directory.
    """
    for entry in sorted(directory.iterdir()) if directory.exists() else ():
        if _UNFINISHED.fullmatch(entry.name):
            log.warning("removing %s: a run was stopped before this checkpoint was whole", entry)
            shutil.rmtree(entry)
        elif not (entry.name.isdecimal() and entry.is_dir()):
            raise CheckpointError(f"{directory} must hold checkpoints alone, got {entry.name!r}; move it elsewhere")
    if not (steps := _steps(directory)):
        return None
    path = directory.absolute() / str(steps[-1])
    expected = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in named_leaves(template).items()}
    try:
        with _checkpointer() as checkpointer:
            about = checkpointer.restore(path, ocp.args.Composite(about=ocp.args.JsonRestore())).about
            if about["fingerprint"] != fingerprint:
                raise CheckpointError(
                    f"{path} was written by a run of another configuration or of other data (its fingerprint is "
                    f"{about['fingerprint'][:12]}, this run's is {fingerprint[:12]}); use another run_dir"
                )
            if about["step"] != steps[-1] or set(about["checksums"]) != set(expected):
                raise CheckpointError(f"{path} is of another model or version, or was renamed; use another run_dir")
            items = ocp.args.Composite(state=ocp.args.StandardRestore(expected))
            arrays = checkpointer.restore(path, items).state
        for name, checksum in _checksums(arrays).items():
            if about["checksums"][name] != checksum:
                raise OSError(f"the checksum of {name} is wrong")
            if (arrays[name].shape, arrays[name].dtype) != (expected[name].shape, expected[name].dtype):
                raise CheckpointError(f"{path} is of another model: {name} is {arrays[name].shape} there")
        if strange := _not_finite(arrays):
            raise CheckpointError(f"{path} cannot be gone on from: {strange}\n{_ADVICE}")
    except CheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds; every one means that the files are not whole
        raise CheckpointError(f"{path} is damaged: {error}\n{_ADVICE}") from error
    leaves = [jax.numpy.asarray(arrays[name]) for name in expected]
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


def _not_finite(arrays: Mapping[str, ArrayLike]) -> str | None:
    """Which array is the first to hold a NaN or an infinity, in words."""
    for name, array in arrays.items():
        strange = np.asarray(array)[~np.isfinite(array)]
        if strange.size:
            return f"{name} is {strange[0]}" if np.ndim(array) == 0 else f"{name} holds {strange[0]}"
    return None


def _checksums(arrays: dict[str, Any]) -> dict[str, int]:
    """CRC-32 of each array's bytes, dtype and shape: the storage format does not check them all itself."""
    return {
        name: zlib.crc32(np.ascontiguousarray(x).tobytes(), zlib.crc32(json.dumps([str(x.dtype), x.shape]).encode()))
        for name, x in arrays.items()
    }
