"""Sizes of the kernels, checked where they are made."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PerQueryConfig:
    """Sizes of the per-query TPU kernels.

    Attributes:
      tile_size: pairs of a tile, all of one key block; what a block's last tile lacks is padding. None: 128, or 64
        where a chunk has few pairs for each block.
      backward_tile_size: pairs of a tile, and of a grid step, in the backward pass. Shorter tiles would pay only below
        some 80 pairs a block.
      slots_per_step: pairs that one step of the forward grid works through, several tiles side by side, to hide each
        other's latency; fewer where on-chip memory demands it.
      chunk_bytes: on-chip memory for a chunk of queries with its accumulator. The larger the chunk, the more pairs of a
        chunk share a key block and the fewer slots are padding. None: what the chip has, less what a step needs.
      table_entries: most tiles of a chunk, whose numbers must fit the scalar memory.
      piece_rows: queries of a chunk that are copied at a time on their way to the chip, and outputs on their way back.
        None: all of a short chunk, else half a megabyte.
      pieces_per_step: pieces of key blocks that one step walks when pairs are cut into tiles, a multiple of 4.
    """

    tile_size: int | None = None
    backward_tile_size: int = 256
    slots_per_step: int = 1024
    chunk_bytes: int | None = None
    table_entries: int = 40000
    piece_rows: int | None = None
    pieces_per_step: int = 512

    def __post_init__(self) -> None:
        for name in ("tile_size", "backward_tile_size"):
            size = getattr(self, name)
            if size is not None and size not in (8, 16, 32, 64) and (size < 128 or size % 128):
                raise ValueError(f"{name} must be 8, 16, 32, 64 or a multiple of 128, got {name}={size}")
        for name in ("slots_per_step", "chunk_bytes", "table_entries"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={size}")
        if self.piece_rows is not None and (self.piece_rows < 128 or self.piece_rows % 128):
            raise ValueError(f"piece_rows must be a multiple of 128, got piece_rows={self.piece_rows}")
        if self.pieces_per_step < 4 or self.pieces_per_step % 4:
            raise ValueError(f"pieces_per_step must be a multiple of 4, got pieces_per_step={self.pieces_per_step}")


PER_QUERY = PerQueryConfig()


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """Sizes of the Triton kernels, all of them powers of two except num_stages. None has been tuned on a GPU yet.

    Attributes:
      tile_size: pairs of a tile in the forward pass, all of one key block.
      key_size: keys that a program takes at a time, forward and backward.
      backward_tile_size: pairs of a tile in the backward pass.
      attend_warps: warps of a program that attends, forward and backward.
      num_stages: loads in flight in a loop, as Triton counts them.
      merge_rows: queries of a program that merges partial results.
      route_queries: queries of a program that routes.
      route_blocks: blocks that it scores at a time.
      route_warps: its warps.
      means_keys: keys that a program of the block means adds up at a time.
      chunk_bytes: memory for the partial results of a chunk of queries. None: 3/16 of the inputs and outputs
        less the choices, so that all stays below 1.2 times inputs and outputs, but at least 1/16 of them and 8 MiB.
    """

    tile_size: int = 128
    key_size: int = 64
    backward_tile_size: int = 64
    attend_warps: int = 8
    num_stages: int = 2
    merge_rows: int = 32
    route_queries: int = 64
    route_blocks: int = 64
    route_warps: int = 8
    means_keys: int = 64
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        least = {"tile_size": 16, "key_size": 16, "backward_tile_size": 16, "route_queries": 16, "route_blocks": 16}
        for name, size in dataclasses.asdict(self).items():
            smallest = least.get(name, 1)
            if name == "num_stages" or (name == "chunk_bytes" and size is not None):
                if size < 1:
                    raise ValueError(f"{name} must be at least 1, got {name}={size}")
            elif name != "chunk_bytes" and (size < smallest or size & (size - 1)):
                raise ValueError(f"{name} must be a power of two, at least {smallest}, got {name}={size}")

    def for_rows(self, columns: int, item_bytes: int) -> "TritonConfig":
        """The sizes for rows of `columns` numbers, a power of two: smaller tiles above 128 columns of 16 bits.

        float32 counts four times, not twice: its products are made outside the tensor cores and take more registers.
        """
        share = max(columns * (4 if item_bytes == 4 else 1) // 128, 1)
        names = ("tile_size", "key_size", "backward_tile_size", "merge_rows")
        return dataclasses.replace(self, **{name: max(getattr(self, name) // share, 16) for name in names})


TRITON = TritonConfig()


@dataclasses.dataclass(frozen=True)
class MosaicConfig:
    """Sizes of the Mosaic GPU kernels, for Hopper. None has been tuned, and the kernels have not run on a GPU yet.

    Attributes:
      query_slots: tiles of queries in shared memory, forward, at least two: one is loaded while another is worked on.
      key_slots: blocks of keys and values in shared memory, forward, at least two.
      gather_in_kernel: whether the kernels gather the rows of a tile themselves; else XLA does so before, into one more
        array of chunk size (for packed rows: of up to a tile a key).
      compute_registers: registers of a thread that computes, of which there are 256, forward.
      memory_registers: registers of a thread that moves data, of which there are 128, forward.
      num_programs: multiprocessors of the GPU, each of which runs one program.
      chunk_bytes: as in `TritonConfig`.
    """

    query_slots: int = 2
    key_slots: int = 2
    gather_in_kernel: bool = True
    compute_registers: int = 232
    memory_registers: int = 40
    num_programs: int = 132
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        least = {"query_slots": 2, "key_slots": 2, "num_programs": 1, "chunk_bytes": 1}
        for name, smallest in least.items():
            size = getattr(self, name)
            if size is not None and size < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {name}={size}")
        for name in ("compute_registers", "memory_registers"):
            size = getattr(self, name)
            if size % 8 or not 24 <= size <= 256:
                raise ValueError(f"{name} must be a multiple of 8 from 24 to 256, got {name}={size}")
        if 2 * self.compute_registers + self.memory_registers > 512:
            raise ValueError(
                "2 * compute_registers + memory_registers must be at most 512, got "
                f"compute_registers={self.compute_registers}, memory_registers={self.memory_registers}"
            )


MOSAIC = MosaicConfig()
