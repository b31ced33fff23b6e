"""Real text that every machine has: the Python source of the interpreter's standard library and of installed packages.

Files that resemble each other stand on one side of the split. Two files resemble each other if at least half of their
distinct lines are common: Jaccard index >= 0.5. Lines count stripped, if at least 12 characters remain and at most 50
files have them: the others are licences and the like, and count only in files that hold nothing else. Pairs to compare
are found by MinHash (64 hashes in 16 bands of 4), which finds a pair of index s with probability 1 - (1 - s^4)^16:
0.64 at 0.5, 0.99 at 0.7.
"""

import hashlib
import importlib.util
import itertools
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.config import DataConfig
from experiments.data.source import ALL, Batch, Split

SEPARATOR = 256  # token before every document: its start, and the end of the one before; tokens below are bytes
SIMILAR = 0.5  # least Jaccard index of near-duplicates
WIDESPREAD = 50  # a line in more documents than this says nothing about resemblance
# Other libraries, parts that some systems leave out, and data that only look like source.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "internal_test_util"}


class PackedDocuments:
    """Documents laid end to end and cut into sequences, each token with the id of its document in segment_ids.

    The stream is `separator document separator document ... separator`. A sequence is sequence_length consecutive
    tokens of it, targets are the tokens one further on. An epoch of training visits every sequence once, in an order
    and with an offset of the cuts that depend on seed and epoch; validation visits them in one fixed order.

    Args:
      train, validation: integer [tokens], the streams; memory maps do.
      separator: the token between documents.
      config: sizes.
      seed: decides the order of training.
      vocab_size, bytes_per_token, description: as of `Data`.

    Raises:
      ValueError: a stream is too short for one sequence.
    """

    def __init__(
        self,
        train: np.ndarray,
        validation: np.ndarray,
        separator: int,
        config: DataConfig,
        seed: int,
        vocab_size: int,
        bytes_per_token: float | None,
        description: dict,
    ):
        self._streams = {"train": train, "validation": validation}
        self._separator, self._config, self._seed = separator, config, seed
        self._orders: dict[tuple[Split, int], np.ndarray] = {}
        self.vocab_size, self.bytes_per_token, self.description = vocab_size, bytes_per_token, description
        for split, stream in self._streams.items():
            if len(stream) <= 2 * config.sequence_length:
                raise ValueError(
                    f"sequence_length must be below half of the {len(stream)} tokens of the {split} split, got "
                    f"sequence_length={config.sequence_length}; more text needs a larger max_bytes"
                )

    def batch(self, step: int, split: Split, rows: np.ndarray | slice = ALL) -> Batch:
        length, num_rows = self._config.sequence_length, self._config.batch_size
        indices = np.arange(step * num_rows, (step + 1) * num_rows)[rows]
        starts = np.array([self._start(split, int(index)) for index in indices])
        windows = self._streams[split][starts[:, None] + np.arange(length + 1)].astype(np.int32)  # [rows, length + 1]
        tokens = windows[:, :-1]
        return {
            "tokens": tokens,
            "targets": windows[:, 1:],
            "segment_ids": np.cumsum(tokens == self._separator, axis=1, dtype=np.int32),
        }

    def _start(self, split: Split, index: int) -> int:
        """Where in the stream sequence `index` of the endless series of epochs begins."""
        length = self._config.sequence_length
        count = len(self._streams[split]) // length - 1  # so that any offset below length still fits
        epoch, place = divmod(index, count)
        if (split, epoch) not in self._orders:
            rng = np.random.default_rng([0, 0, 0] if split == "validation" else [1, self._seed, epoch])
            offset = rng.integers(length) if split == "train" else 0
            for old in [key for key in self._orders if key[0] == split and key[1] < epoch - 1]:
                del self._orders[old]
            self._orders[split, epoch] = rng.permutation(count) * length + offset
        return int(self._orders[split, epoch][place])


def python_source(config: DataConfig, seed: int) -> PackedDocuments:
    """Python files of the standard library and of config.packages, as bytes.

    Files come in the order of a hash of their paths below the library, so that max_bytes takes a sample of everything,
    the same on every machine with the same versions; a group of near-duplicates goes to validation as a whole.

    Raises:
      ValueError: a package is not installed, or there is too little text.
    """
    documents: list[tuple[str, bytes]] = []
    total = 0
    for name, path in sorted(_python_files(config.packages), key=lambda each: _hash(each[0])):
        content = path.read_bytes()
        if total + len(content) > config.max_bytes:
            break
        if content.strip():
            documents.append((name, content))
            total += len(content)
    groups = near_duplicates([content for _, content in documents])
    leaders = [documents[group][0] for group in groups]  # a group's split is decided by its first file's name
    is_validation = [_hash(f"split {name}") / 2**64 < config.validation_fraction for name in leaders]
    parts = {
        split: [content for (_, content), held_out in zip(documents, is_validation, strict=True) if held_out is wanted]
        for split, wanted in (("train", False), ("validation", True))
    }
    streams = {split: pack_bytes(contents) for split, contents in parts.items()}
    validation_bytes = sum(map(len, parts["validation"]))
    description = {
        "task": "text",
        "files": len(documents),
        "groups": len(set(groups)),
        "train_bytes": total - validation_bytes,
        "validation_bytes": validation_bytes,
        "sha256": hashlib.sha256(streams["train"].tobytes() + streams["validation"].tobytes()).hexdigest(),
    }
    return PackedDocuments(
        streams["train"],
        streams["validation"],
        SEPARATOR,
        config,
        seed,
        vocab_size=SEPARATOR + 1,
        bytes_per_token=validation_bytes / max(len(streams["validation"]) - 1, 1),
        description=description,
    )


def pack_bytes(documents: Iterable[bytes]) -> np.ndarray:
    """The documents' bytes between separators, uint16 [tokens].

    >>> pack_bytes([b"ab", b"c"]).tolist()
    [256, 97, 98, 256, 99, 256]
    """
    edge = np.full(1, SEPARATOR, np.uint16)
    parts = itertools.chain.from_iterable((edge, np.frombuffer(each, np.uint8).astype(np.uint16)) for each in documents)
    return np.concatenate([*parts, edge])


def near_duplicates(documents: Sequence[bytes]) -> list[int]:
    """For each document the index of the first one of its group; documents that resemble each other form a group.

    >>> near_duplicates([b"one long line here", b"quite another line", b"one long line here\\n\\n"])
    [0, 1, 0]
    """
    lines = [_distinct_lines(each) for each in documents]
    line, count = np.unique(np.concatenate([*lines, np.zeros(0, np.uint64)]), return_counts=True)
    telling = [np.setdiff1d(each, line[count > WIDESPREAD], assume_unique=True) for each in lines]
    lines = [few if len(few) else each for few, each in zip(telling, lines, strict=True)]
    leader = list(range(len(documents)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    buckets = defaultdict(list)
    for index, hashes in enumerate(lines):
        if len(hashes):
            for band, signature in enumerate(_min_hashes(hashes).reshape(16, 4)):
                buckets[band, signature.tobytes()].append(index)
    for members in buckets.values():
        for first, second in itertools.pairwise(members):
            a, b = find(first), find(second)
            if a != b and _jaccard(lines[first], lines[second]) >= SIMILAR:
                leader[max(a, b)] = min(a, b)
    return [find(index) for index in range(len(documents))]


def _python_files(packages: Sequence[str]) -> Iterable[tuple[str, Path]]:
    """Name, which is the path below its library, and path of every Python file."""
    roots = [("stdlib", Path(sysconfig.get_path("stdlib")))]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"packages must be installed packages, got {package!r} in packages={packages}")
        roots.append((package, Path(spec.submodule_search_locations[0])))
    for library, root in roots:
        for path in root.rglob("*.py"):
            below = path.relative_to(root)
            if not _SKIPPED.intersection(below.parts) and path.is_file():
                yield f"{library}/{below.as_posix()}", path


def _hash(name: str) -> int:
    """A hash below 2^64 that is the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _distinct_lines(document: bytes) -> np.ndarray:
    """Sorted hashes of the distinct lines that say something, uint64 [lines]."""
    lines = {line.strip() for line in document.splitlines()}
    return np.unique(np.array([zlib.crc32(line) for line in lines if len(line) >= 12], np.uint64))


def _min_hashes(hashes: np.ndarray) -> np.ndarray:
    """MinHash signature uint64 [64] of a set of hashes: the least value of each of 64 multiply-shift permutations."""
    odd = np.random.default_rng(0).integers(0, 2**63, 64, dtype=np.uint64) * 2 + 1
    return (hashes[None] * odd[:, None] >> np.uint64(16)).min(axis=1)


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)
