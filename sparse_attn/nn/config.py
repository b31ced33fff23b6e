"""Sizes and kinds of the hybrid Transformer."""

import dataclasses
from typing import Literal, get_args

LayerKind = Literal["sliding_window", "moba", "dense"]
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Decoder-only Transformer whose layers alternate kinds of attention.

    The defaults are near FlashMoBA's 340M model (arXiv 2511.11571): width, heads and MLP are the paper's; the number of
    layers, the window and the vocabulary are assumptions. With tied embeddings they make 341M parameters.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    vocab_size: int = 32_000  # token ids
    num_layers: int = 24  # layers of attention and MLP
    hidden_size: int = 1024  # features of a token
    mlp_size: int = 2816  # features inside the SwiGLU MLP
    num_heads: int = 16  # query heads
    num_key_value_heads: int = 0  # key and value heads, a divisor of num_heads; 0: as many as num_heads
    head_dim: int = 64  # features of a head; even
    layer_pattern: tuple[LayerKind, ...] = ("sliding_window", "moba")  # attention of each layer, repeated
    window_size: int = 256  # tokens that a sliding_window layer sees, the current one included
    rope_theta: float = 10_000.0  # base of the rotary wavelengths (tokens / 2 pi) in sliding_window layers
    block_size: int = 128  # tokens in a block of a moba layer
    top_k: int = 8  # blocks that a query of a moba layer attends, its own included
    key_conv_width: int = 0  # tokens that the key convolution of moba and dense layers spans; 0: none; the paper: 3, 5
    norm_epsilon: float = 1e-6  # added to the mean square in RMSNorm
    tie_embeddings: bool = False  # whether the output projection is the embedding transposed
    dtype: DtypeName = "float32"  # dtype of the computation; logits, softmax and norms are float32 anyway
    param_dtype: DtypeName = "float32"  # dtype of the parameters
    remat: bool = False  # whether the backward pass recomputes each layer instead of keeping its activations
    scan_layers: bool = False  # whether repeats of the pattern are stacked and scanned, which compiles them once

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "num_layers", "hidden_size", "mlp_size", "num_heads", "head_dim")
        for name in (*sizes, "window_size", "block_size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={getattr(self, name)}")
        for name in ("num_key_value_heads", "key_conv_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {name}={getattr(self, name)}")
        for name in ("rope_theta", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {name}={getattr(self, name)}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in get_args(DtypeName):
                raise ValueError(f"{name} must be one of {get_args(DtypeName)}, got {name}={getattr(self, name)!r}")
        kinds = get_args(LayerKind)
        if not self.layer_pattern or not set(self.layer_pattern) <= set(kinds):
            raise ValueError(f"layer_pattern must name one or more of {kinds}, got layer_pattern={self.layer_pattern}")
        if self.num_key_value_heads and self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must be 0 or a divisor of num_heads={self.num_heads}, got "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if "sliding_window" in self.layer_pattern and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary positions, got head_dim={self.head_dim}")
        if self.scan_layers and self.num_layers % len(self.layer_pattern):
            raise ValueError(
                f"num_layers must be a multiple of the {len(self.layer_pattern)} layers of layer_pattern for "
                f"scan_layers=True, got num_layers={self.num_layers}"
            )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Attention of every layer, first to last."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))
