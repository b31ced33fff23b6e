"""Loss, accuracy, bits per byte, accuracy by the depth of a needle, and needles that the model writes itself."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from experiments.config import DataConfig
from experiments.data.source import Batch, Data
from experiments.mesh import split_rows
from sparse_attn.nn import Transformer

DEPTH_BINS = 10


def evaluate(
    model: Transformer,
    data: Data,
    num_batches: int,
    *,
    by_generation: bool = False,
    loss_chunk: int = 0,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Evaluates a model on validation batches, at the sequence length of the data, whatever it was trained at.

    Args:
      model: the model.
      data: where the batches come from.
      num_batches: how many.
      by_generation: whether to let the model write the answers too; for needle alone.
      loss_chunk: as in `token_losses`.
      mesh: the mesh of `jax.set_mesh` that the model lies on, every process reading all rows; None: one device.

    Returns:
      loss: mean cross-entropy of the targets (nats).
      accuracy: part of the targets whose token has the largest logit.
      num_targets: how many there were.
      bits_per_byte (text): loss / ln 2 / bytes_per_token.
      accuracy_by_depth (needle): accuracy of the answers that stand in each tenth of the sequence, None where no
        answer does.
      generated_accuracy (by_generation): part of the answers that the model writes right, behind prompts that end with
        the questions, with a cache.
      generated_agreement (by_generation): part of the answers that are right, or wrong, by logits and writing alike.

    Raises:
      ValueError: by_generation of another task.
    """
    losses: list[np.ndarray] = []
    hits: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    written: list[np.ndarray] = []
    for step in tqdm(range(num_batches), desc="evaluate", leave=False, disable=None):
        batch = data.batch(step, "validation")
        arrays = split_rows(batch, mesh, len(batch["tokens"]))
        scores = _score(model, arrays, loss_chunk, mesh)
        asked = batch["targets"] >= 0
        for kept, score in zip((losses, hits), scores, strict=True):
            kept.append(np.asarray(score)[asked])
        if "depth" in batch:
            depths.append(batch["depth"][asked])
        if by_generation:
            written.append(_write_needles(model, batch))
    loss, hit = np.concatenate(losses).astype(np.float64), np.concatenate(hits)
    result: dict[str, Any] = {"loss": float(loss.mean()), "accuracy": float(hit.mean()), "num_targets": int(hit.size)}
    if data.bytes_per_token is not None:
        result["bits_per_byte"] = result["loss"] / math.log(2) / data.bytes_per_token
    if depths:
        place = np.minimum(np.concatenate(depths) * DEPTH_BINS, DEPTH_BINS - 1).astype(int)
        chosen = [hit[place == i] for i in range(DEPTH_BINS)]
        result["accuracy_by_depth"] = [float(each.mean()) if each.size else None for each in chosen]
    if written:
        write = np.concatenate(written)
        result["generated_accuracy"] = float(write.mean())
        result["generated_agreement"] = float((write == hit).mean())
    return result


def _write_needles(model: Transformer, batch: Batch) -> np.ndarray:
    """Whether the model writes the answer of each target right, bool [targets]."""
    if "depth" not in batch:
        raise ValueError("by_generation must be off for all tasks but needle, whose questions end a sequence")
    row, place = np.nonzero(batch["targets"] >= 0)
    chunk = min(512, batch["tokens"].shape[1])
    found = model.generate(batch["tokens"][row], lengths=place + 1, max_new_tokens=1, prefill_chunk=chunk)
    return found.tokens[:, 0] == batch["targets"][row, place]


def token_losses(model: Transformer, batch: Mapping[str, Any], loss_chunk: int = 0) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every target, and whether it has the largest logit.

    Args:
      model: the model.
      batch: tokens and targets, int [batch, sequence], and segment_ids where there are documents.
      loss_chunk: tokens of a sequence whose logits are there at a time, in the backward pass too; 0: all. Only numbers
        [batch, loss_chunk, vocab_size] are ever held.

    Returns:
      float32 [batch, sequence] (nats), anything where the target is -1, and bool [batch, sequence].
    """
    tokens, targets, segment_ids = batch["tokens"], jnp.asarray(batch["targets"]), batch.get("segment_ids")

    def score(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return loss, logits.argmax(-1) == targets

    rows, length = targets.shape
    if not 0 < loss_chunk < length:
        return score(model(tokens, segment_ids), targets)
    num_chunks = -(-length // loss_chunk)

    def split(array: jax.Array) -> jax.Array:
        """[batch, sequence, ...] to [chunks, batch, loss_chunk, ...]."""
        padding = ((0, 0), (0, num_chunks * loss_chunk - length), *((0, 0),) * (array.ndim - 2))
        return jnp.pad(array, padding).reshape(rows, num_chunks, loss_chunk, *array.shape[2:]).swapaxes(0, 1)

    def score_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return score(model.logits(chunk[0]), chunk[1])

    chunks = (split(model.hidden(tokens, segment_ids)), split(targets))
    scores = jax.lax.map(jax.checkpoint(score_chunk, prevent_cse=False), chunks)
    return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(rows, -1)[:, :length], scores)


@nnx.jit(static_argnums=(2, 3))
def _score(
    model: Transformer, batch: Mapping[str, Any], loss_chunk: int, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """`token_losses`, which every process has as a whole."""
    scores = token_losses(model, batch, loss_chunk)
    return scores if mesh is None else jax.lax.with_sharding_constraint(scores, NamedSharding(mesh, PartitionSpec()))


def at_length(data: DataConfig, sequence_length: int) -> DataConfig:
    """The same data at another sequence length, with as many tokens in a batch (at least one sequence)."""
    batch_size = max(1, data.batch_size * data.sequence_length // sequence_length)
    return dataclasses.replace(data, sequence_length=sequence_length, batch_size=min(batch_size, data.batch_size))
