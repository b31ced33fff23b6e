"""Checkpoints: what is saved comes back to the bit; what is damaged or foreign is an error that says so."""

import logging
import shutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint
from experiments.checkpoint import CheckpointError


class State(NamedTuple):
    params: dict
    step: jax.Array


def make_state(step):
    noise = jax.random.normal(jax.random.key(step), (64, 64))
    params = {"kernel": noise, "layers": [{"bias": noise[0].astype(jnp.bfloat16)}, {"bias": jnp.zeros(1)}]}
    return State(params, jnp.asarray(step, jnp.int32))


def save(directory, *steps, keep=2, fingerprint="this run"):
    for step in steps:
        checkpoint.save(directory, step, make_state(step), fingerprint, 1.5 * step, keep)


def restore(directory, fingerprint="this run"):
    return checkpoint.restore(directory, jax.eval_shape(lambda: make_state(0)), fingerprint)


def test_newest_state_comes_back_to_the_bit_and_old_ones_go(tmp_path):
    assert restore(tmp_path / "none") is None
    save(tmp_path, 3, 7, 10)
    step, state, seconds = restore(tmp_path)
    assert (step, seconds) == (10, 15.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, make_state(10))
    chex.assert_trees_all_equal(state, make_state(10))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10", "7"]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("place", ["kernel", "bias"])  # float32, bfloat16
def test_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, place, value):
    save(tmp_path, 3, keep=1)
    state = make_state(7)
    strange = jax.tree.map_with_path(
        lambda path, x: x.at[-1].set(value) if place in jax.tree_util.keystr(path) and x.size > 1 else x, state
    )
    with pytest.raises(FloatingPointError, match=rf"params\..*{place} is {value} at step 7.*good.*/3$"):
        checkpoint.save(tmp_path, 7, strange, "this run", 1.0, 1)
    with pytest.raises(FloatingPointError, match="no checkpoint yet"):
        checkpoint.save(tmp_path / "new", 7, strange, "this run", 1.0, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["3"]
    chex.assert_trees_all_equal(restore(tmp_path)[1], make_state(3))
    # One that an older version wrote is refused, and the advice helps.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "require_finite", lambda *_: None)
        checkpoint.save(tmp_path, 7, strange, "this run", 1.0, 2)
    with pytest.raises(CheckpointError, match=rf"7 .*{place} is {value}\nDelete this directory"):
        restore(tmp_path)
    shutil.rmtree(tmp_path / "7")
    assert restore(tmp_path)[0] == 3


def test_unfinished_checkpoint_is_removed_and_the_log_says_so(tmp_path, caplog):
    save(tmp_path, 3, 7)
    shutil.copytree(tmp_path / "7", tmp_path / "11.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "3", tmp_path / "2.deleted")
    with caplog.at_level(logging.WARNING, logger="experiments.checkpoint"):
        assert restore(tmp_path)[0] == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["3", "7"]
    assert "11.orbax-checkpoint-tmp" in caplog.text
    assert "2.deleted" in caplog.text


def test_kill_while_writing_leaves_a_name_that_counts_as_unfinished(tmp_path, monkeypatch, caplog):
    """Orbax itself makes the unfinished directory here: its last act, the renaming, does not happen."""
    save(tmp_path, 3)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", killed)
        patch.setattr("os.replace", killed)
        patch.setattr("pathlib.Path.rename", killed)
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(BaseException):  # noqa: B017, PT011 -- Orbax may wrap it
            save(tmp_path, 7)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "3"] != []
    assert restore(tmp_path)[0] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["3"]


def damage_bytes(path):
    """Inverts 64 bytes in the middle of the largest file."""
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - byte for byte in content[middle : middle + 64])
    largest.write_bytes(content)


def damage_length(path):
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def damage_about(path):
    shutil.rmtree(path / "about")


def damage_everything(path):
    shutil.rmtree(path)
    path.mkdir()


# Orbax leaves the other arrays' reads unfinished when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [damage_bytes, damage_length, damage_about, damage_everything])
def test_damaged_checkpoint_is_an_error_that_names_it(tmp_path, damage):
    save(tmp_path, 3, 7)
    damage(tmp_path / "7")
    with pytest.raises(CheckpointError, match="7 is damaged"):
        restore(tmp_path)
    shutil.rmtree(tmp_path / "7")  # what the message advises
    assert restore(tmp_path)[0] == 3


def test_foreign_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 3, fingerprint="another run")
    with pytest.raises(CheckpointError, match="another configuration"):
        restore(tmp_path)


def test_other_structure_is_an_error(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(tmp_path, {"params": jnp.zeros(3)}, "this run")


def test_other_shape_is_an_error(tmp_path):
    save(tmp_path, 3)
    state = make_state(0)
    template = State(state.params | {"kernel": jnp.zeros((32, 64))}, state.step)
    with pytest.raises(CheckpointError, match=r"params\.kernel is"):
        checkpoint.restore(tmp_path, template, "this run")


def test_renamed_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "3").rename(tmp_path / "30")
    with pytest.raises(CheckpointError, match="renamed"):
        restore(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_bit_and_the_order_count_in_a_checksum(dtype):
    bits = np.arange(1, 13, dtype=f"uint{8 * jnp.dtype(dtype).itemsize}")

    def checksum(bits):
        array = jax.lax.bitcast_convert_type(bits, dtype).reshape(3, 4)
        return checkpoint._summarize({"array": array})[0]["array"]

    kinds = [bits, np.roll(bits, 1), bits[::-1].copy()]
    for place in (0, 5, 11):
        for bit in range(8 * bits.itemsize):
            kinds.append(bits.copy())
            kinds[-1][place] ^= bits.dtype.type(1 << bit)
    kinds.append(bits ^ bits.dtype.type(1 << (8 * bits.itemsize - 1)))  # every sign at once
    assert len(set(map(checksum, kinds))) == len(kinds)


@pytest.mark.parametrize("name", ["notes.txt", "12"])
def test_files_that_are_no_checkpoints_are_an_error(tmp_path, name):
    save(tmp_path, 3)
    (tmp_path / name).write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=name):
        restore(tmp_path)
