"""Presets: what each study runs at one scale. One file a preset, whose header says finding, command, hardware, time."""

import dataclasses
import importlib
from typing import Literal, get_args

from experiments.config import RunConfig
from experiments.studies.comparison import ComparisonConfig
from experiments.studies.efficiency import EfficiencyConfig
from experiments.studies.snr import SnrConfig

PresetName = Literal["tiny", "small", "paper-340m", "paper-1b"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """The studies at one scale. In every list of (block_size, top_k) the product is the same: an equal budget."""

    name: PresetName
    """Name of its file, with - for _."""
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


def load_preset(name: PresetName) -> Preset:
    """The preset of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in get_args(PresetName):
        raise ValueError(f"preset must be one of {get_args(PresetName)}, got {name!r}")
    return importlib.import_module(f"experiments.configs.{name.replace('-', '_')}").preset()
