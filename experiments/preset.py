"""What the studies can be told, with units, and a preset: all of it at one scale."""

import dataclasses

from experiments.config import RunConfig


@dataclasses.dataclass(frozen=True)
class SnrConfig:
    """The Monte Carlo varies one quantity at a time around a centre; the measurement needs trained recall models.

    Raises:
      ValueError: trials is not a multiple of groups.
    """

    head_dim: int = 64
    """Centre: channels of a head (channels)."""
    block_size: int = 32
    """Centre: keys in a block (tokens)."""
    num_related: int = 1
    """Centre: related keys in the relevant block (keys)."""
    delta_mu: float = 1.0
    """Centre: mean product of query and relevant key above that of unrelated keys (a pure number)."""
    head_dims: tuple[int, ...] = (32, 64, 128)
    """Values of head_dim (channels)."""
    block_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Values of block_size (tokens)."""
    nums_related: tuple[int, ...] = (1, 2, 4)
    """Values of num_related (keys)."""
    delta_mus: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Values of delta_mu (pure numbers)."""
    cluster_gap: float = 0.5
    """Mean product of the query with the other related keys above that of unrelated keys (a pure number)."""
    num_blocks: int = 16
    """Candidate blocks (blocks)."""
    top_k: int = 3
    """Blocks chosen among them (blocks)."""
    trials: int = 1024
    """Queries drawn for each point (queries)."""
    groups: int = 8
    """Parts of the trials whose scatter gives the standard error (parts)."""
    evaluate_batches: int = 2
    """Validation batches on which trained models are measured (batches)."""

    def __post_init__(self) -> None:
        if self.groups < 2 or self.trials % self.groups:
            raise ValueError(
                f"trials must be a multiple of groups, at least 2, got trials={self.trials} and groups={self.groups}"
            )


@dataclasses.dataclass(frozen=True)
class EfficiencyConfig:
    """What is timed. Dense attention holds a table of queries x keys, so it stops at a length of its own.

    Raises:
      ValueError: there is nothing to time.
    """

    sequence_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Sequence lengths (tokens)."""
    longest_dense: int = 16384
    """Longest forward pass of dense attention (tokens)."""
    longest_dense_backward: int = 8192
    """Longest forward and backward pass of dense attention (tokens)."""
    batch_size: int = 1
    """Sequences (sequences)."""
    num_heads: int = 2
    """Query, key and value heads (heads)."""
    head_dim: int = 64
    """Channels of a head (channels)."""
    block_size: int = 64
    """Keys in a block (tokens)."""
    top_k: int = 8
    """Blocks that a query attends (blocks)."""
    dtype: str = "float32"
    """Type of queries, keys and values (a name)."""
    repeats: int = 7
    """Measurements of each contestant (calls)."""
    torch: bool = True
    """Whether to time the forward pass of PyTorch's scaled_dot_product_attention too, where PyTorch is installed (on a
    CPU, in float32)."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.sequence_lengths:
            raise ValueError(
                f"repeats must be at least 1 and sequence_lengths not empty, got repeats={self.repeats} and "
                f"sequence_lengths={self.sequence_lengths}"
            )


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """Which decoding is timed."""

    max_length: int = 65536
    """Tokens that the cache holds, all of which but those of the timed steps come by prefill (tokens)."""
    batch_size: int = 1
    """Rows (rows)."""
    num_key_value_heads: int = 2
    """Key and value heads (heads)."""
    groups: tuple[int, ...] = (1, 4)
    """Query heads of a key head, one measurement each (heads)."""
    head_dim: int = 64
    """Channels of a head (channels)."""
    block_size: int = 128
    """Keys in a block (tokens)."""
    top_k: int = 8
    """Blocks that a query attends (blocks)."""
    prefill_chunk: int = 4096
    """Tokens of a call of the prefill in chunks (tokens)."""
    steps: int = 64
    """Steps of one measurement (steps)."""
    repeats: int = 7
    """Measurements of steps; prefill is measured three times (measurements)."""
    dtype: str = "float32"
    """Type of queries, keys and values (a name)."""

    def __post_init__(self) -> None:
        if self.max_length <= self.steps * (self.repeats + 1):
            raise ValueError(
                f"max_length must be above steps * (repeats + 1) = {self.steps * (self.repeats + 1)}, got "
                f"max_length={self.max_length}"
            )


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


@dataclasses.dataclass(frozen=True)
class Preset:
    """The studies at one scale. In every list of (block_size, top_k) the product is the same: an equal budget."""

    name: str
    """Its name in `configs.PRESETS`."""
    recall: RunConfig
    """Associative recall: the run that the variants of block_size, key_convolution, length and snr start from."""
    recall_seeds: tuple[int, ...]
    """Seeds of every recall variant."""
    block_sizes: tuple[tuple[int, int], ...]
    """block_size study: (block_size, top_k), falling block size (tokens, blocks)."""
    key_conv_block: tuple[int, int]
    """key_convolution study: the (block_size, top_k) of all its variants (tokens, blocks)."""
    key_conv_widths: tuple[int, ...]
    """key_convolution study: widths of the convolution, 0 for none (tokens)."""
    lengths: tuple[int, ...]
    """length study: sequence lengths of the evaluation (tokens)."""
    language_model: RunConfig
    """Real text: the run that the variants of language_model start from."""
    language_model_seeds: tuple[int, ...]
    """Seeds of every language model."""
    language_model_blocks: tuple[tuple[int, int], ...]
    """language_model study: (block_size, top_k), large and small; the convolution is tried on the small."""
    snr: SnrConfig
    """Monte Carlo of the statistical model, and measurement on the recall models."""
    efficiency: EfficiencyConfig
    """Times and memory over sequence length."""
    comparison: ComparisonConfig
    """The systems of `sparse_attn.systems` side by side, on the dense models."""
    processes: int = 1
    """Models that train, or are compared, side by side, each on an equal share of the processor cores; 1: one after the
    other on all."""

    def __post_init__(self) -> None:
        for name in ("block_sizes", "language_model_blocks"):
            budgets = {block_size * top_k for block_size, top_k in getattr(self, name)}
            if len(budgets) != 1:
                raise ValueError(f"{name} must have one product block_size * top_k, got {sorted(budgets)}")
        if len(self.language_model_blocks) != 2:
            raise ValueError(f"language_model_blocks must be two, got {len(self.language_model_blocks)}")
        if 0 not in self.key_conv_widths or len(self.key_conv_widths) < 2:
            raise ValueError(f"key_conv_widths must hold 0 and another width, got {self.key_conv_widths}")
