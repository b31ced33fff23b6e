"""Everything that a run can be told, with its unit. A run writes its whole configuration to config.json."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from sparse_attn.nn import TransformerConfig

Task = Literal["recall", "needle", "text", "huggingface"]


def _check_at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {name}={getattr(config, name)}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model reads. Tasks use only the fields that name them.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    task: Task = "recall"
    """recall: answer for every key seen before; needle: for a hidden one, at the end; text: Python source files of this
    machine, byte by byte; huggingface: a data set of the Hugging Face hub or local files, with a trained tokenizer."""
    sequence_length: int = 256
    """Length of a training sequence (tokens)."""
    batch_size: int = 32
    """Sequences in a batch, in training and validation (sequences)."""

    num_keys: int = 64
    """recall, needle: distinct keys, token ids 0 ... num_keys - 1 (tokens)."""
    num_values: int = 64
    """recall, needle: distinct values, the token ids after the keys (tokens)."""
    num_fillers: int = 64
    """recall, needle: distinct meaningless tokens, the ids after the values (tokens)."""
    num_pairs: int = 24
    """recall: most key-value pairs in a sequence, all of which are asked for (training draws 2 to this many, validation
    has this many); needle: pairs hidden in a sequence, of which num_queries are asked for (pairs)."""
    num_queries: int = 1
    """needle: keys asked for at the end of a sequence, at most num_pairs (keys)."""

    max_bytes: int = 8_000_000
    """text, huggingface: most text to read, training and validation together (bytes)."""
    validation_fraction: float = 0.1
    """text, huggingface: part of the files or documents kept for validation (a fraction from 0 to 1)."""
    packages: tuple[str, ...] = ("numpy", "jax", "flax", "optax")
    """text: installed packages whose source is read besides the standard library's (import names)."""

    dataset: str = "HuggingFaceFW/fineweb-edu"
    """huggingface: data set on the hub, or the format of data_files: json, text or parquet (a name)."""
    dataset_config: str | None = "sample-10BT"
    """huggingface: configuration of the data set on the hub; unused with data_files (a name)."""
    data_files: tuple[str, ...] = ()
    """huggingface: local files to read instead of the hub (paths)."""
    text_field: str = "text"
    """huggingface: column that holds the text (a name)."""
    streaming: bool = True
    """huggingface: whether to download only as much as max_bytes needs, instead of the whole data set."""
    tokenizer: str | None = None
    """huggingface: tokenizer.json to load; None trains a byte-level BPE on the corpus and saves it with the run
    (a path)."""
    tokenizer_vocab_size: int = 32_000
    """huggingface: most tokens of the tokenizer that is trained (tokens)."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "batch_size", "num_keys", "num_values", "num_fillers", "num_pairs", "num_queries")
        _check_at_least(self, 4, "sequence_length")
        _check_at_least(self, 1, "max_bytes", "tokenizer_vocab_size")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must lie between 0 and 1, got validation_fraction={self.validation_fraction}"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipping of the gradient.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    learning_rate: float = 2e-3
    """Learning rate at the end of the warm-up (per step)."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly from 0 (steps)."""
    final_fraction: float = 0.0
    """Learning rate at the last step (a fraction of learning_rate)."""
    weight_decay: float = 0.01
    """Decoupled decay of kernels and embeddings, multiplied by the learning rate (per step)."""
    beta1: float = 0.9
    """Decay of the gradient's running mean (a fraction from 0 to 1)."""
    beta2: float = 0.999
    """Decay of the squared gradient's running mean (a fraction from 0 to 1)."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; a longer one is scaled down to it (the gradient's own unit)."""

    def __post_init__(self) -> None:
        _check_at_least(self, 0, "learning_rate", "warmup_steps", "final_fraction", "weight_decay", "beta1", "beta2")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got clip_norm={self.clip_norm}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to look.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    steps: int = 800
    """Length of training, and of the learning rate schedule (optimizer steps)."""
    log_every: int = 50
    """Distance between records of the training loss (steps)."""
    evaluate_every: int = 0
    """Distance between evaluations during training; 0: at the end alone (steps)."""
    evaluate_batches: int = 8
    """Length of an evaluation (validation batches)."""
    checkpoint_every: int = 200
    """Distance between checkpoints; there is always one at the end (steps)."""
    checkpoints_to_keep: int = 2
    """Newest checkpoints that stay on disk (checkpoints)."""
    tensorboard: bool = True
    """Whether to write the metrics for TensorBoard too."""
    accumulate_steps: int = 1
    """Parts of a batch whose gradients are taken one after the other, in less memory (microbatches)."""
    loss_chunk: int = 0
    """Length of the part of a sequence whose logits are there at a time; 0: the whole sequence (tokens)."""

    def __post_init__(self) -> None:
        names = ("steps", "log_every", "evaluate_batches", "checkpoint_every", "checkpoints_to_keep")
        _check_at_least(self, 1, *names, "accumulate_steps")
        _check_at_least(self, 0, "evaluate_every", "loss_chunk")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices that train together. The mesh is no part of a run's identity: it may go on over another one.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    data: int = 1
    """Parts that the rows of a batch are split into, and the hidden features of parameters and optimizer (devices)."""
    model: int = 1
    """Parts that heads, MLP features and vocabulary are split into (devices)."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "data", "model")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run, usually one a host, find each other; nothing is given for a single process.

    What is not given comes from the environment, as `jax.distributed.initialize` has it: from JAX_COORDINATOR_ADDRESS,
    or from a cluster that JAX knows.
    """

    automatic: bool = False
    """Whether to take everything from a cluster that JAX knows, such as Cloud TPU, Slurm or Open MPI."""
    coordinator_address: str | None = None
    """Host and port of process 0, such as 10.0.0.1:1234 (an address)."""
    num_processes: int | None = None
    """Processes of the run (processes)."""
    process_id: int | None = None
    """Number of this process, from 0 (an integer)."""


# Four tiny layers as in the recall experiments; the vocabulary has room for the synthetic tasks and for bytes.
TINY_MODEL = TransformerConfig(
    vocab_size=320,
    num_layers=4,
    hidden_size=64,
    mlp_size=128,
    num_heads=1,
    head_dim=64,
    window_size=4,
    block_size=16,
    top_k=4,
    key_conv_width=3,
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. The same configuration gives the same losses, bit for bit, on the same devices.

    Raises:
      ValueError: fields do not fit each other.
    """

    name: str = "run"
    """Name of the run, used in its directory and in reports."""
    init_from: str | None = None
    """Directory of a run whose newest checkpoint gives the first parameters, of the same names and shapes; optimizer,
    step and learning rate begin anew (a path)."""
    continue_from: str | None = None
    """Directory of a run to go on from: parameters, optimizer and step are those of its newest checkpoint. name,
    optimizer and train may differ, with more steps than it has done; the learning rate follows this run's own schedule
    from that step on (a path)."""
    seed: int = 0
    """Seed of the parameters and of the training data; validation data are the same for every seed (an integer)."""
    model: TransformerConfig = TINY_MODEL
    """Sizes of the Transformer."""
    data: DataConfig = DataConfig()
    """What the model reads."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How parameters move."""
    train: TrainConfig = TrainConfig()
    """How long to train, and how often to look."""
    mesh: MeshConfig = MeshConfig()
    """Devices that train together."""

    def __post_init__(self) -> None:
        if self.init_from is not None and self.continue_from is not None:
            raise ValueError(
                f"init_from and continue_from exclude each other, got init_from={self.init_from!r} and "
                f"continue_from={self.continue_from!r}"
            )
        if self.data.batch_size % (self.mesh.data * self.train.accumulate_steps):
            raise ValueError(
                f"mesh.data * train.accumulate_steps must divide data.batch_size={self.data.batch_size}, got "
                f"mesh.data={self.mesh.data} and train.accumulate_steps={self.train.accumulate_steps}"
            )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON has it: dictionaries, lists, strings and numbers."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(fields: Mapping[str, Any]) -> RunConfig:
    """The inverse of `to_dict`.

    Raises:
      ValueError: a field is not known, so the file is of another version.
    """
    parts = {
        "model": TransformerConfig,
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "train": TrainConfig,
        "mesh": MeshConfig,
    }
    try:
        return RunConfig(**{k: parts[k](**_tuples(v)) if k in parts else v for k, v in fields.items()})
    except TypeError as error:
        raise ValueError(f"not a configuration of this version of the experiments: {error}") from error


def decisive(config: RunConfig) -> dict[str, Any]:
    """All that decides the parameters, but for rounding, by its name on the command line.

    How often a run logs or saves does not, nor over which mesh and in which parts a step is computed.
    """
    fields = to_dict(config)
    parts = {f"{part}.{name}": value for part in ("model", "data", "optimizer") for name, value in fields[part].items()}
    names = ("seed", "init_from", "continue_from")
    return {name: fields[name] for name in names} | parts | {"train.steps": config.train.steps}


def fingerprint(config: RunConfig, data: Mapping[str, Any]) -> str:
    """The identity of a run: hash of `decisive` and of its data's description, which for text depend on the machine.

    Runs of equal fingerprint may continue each other's checkpoints.
    """
    return hashlib.sha256(json.dumps([decisive(config), data], sort_keys=True).encode()).hexdigest()


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
