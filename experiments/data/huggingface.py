"""Text of the Hugging Face hub, or of local files, with a trained tokenizer."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import DataConfig
from experiments.data.source import Split
from experiments.data.text import PackedDocuments
from experiments.metrics import write_json

log = logging.getLogger(__name__)

SEPARATOR = "<|document|>"  # special token before every document
_DOCUMENTS_AT_A_TIME = 1000


def load(config: DataConfig, seed: int, run_dir: Path) -> PackedDocuments:
    """The first config.max_bytes of a data set's documents, as tokens.

    A document's split is decided by a hash of its text, so copies of it stand on one side. Tokenizer and tokens are
    kept in run_dir/data and read from there by a resumed run; nothing else is cached but what `datasets` itself keeps.
    Rows without text (null, empty, blank) are skipped; description["skipped_rows"] and the log say how many.

    Raises:
      ValueError: there is too little text, or run_dir has the tokens of another source.
      ImportError: `datasets` or `tokenizers`, of the extra "huggingface", is missing.
    """
    directory = run_dir / "data"
    about_path = directory / "about.json"
    if not about_path.exists():  # written last: without it, whatever is there is unfinished and is written anew
        directory.mkdir(parents=True, exist_ok=True)
        write_json(about_path, _tokenize(config, directory))
    about = json.loads(about_path.read_text())
    if about["source"] != _source(config):
        raise ValueError(f"{directory} must hold the tokens of {_source(config)}, got those of {about['source']}")
    streams = {
        split: np.memmap(directory / f"{split}.tokens", dtype=about["dtype"], mode="r")
        for split in ("train", "validation")
    }
    return PackedDocuments(
        streams["train"],
        streams["validation"],
        about["separator"],
        config,
        seed,
        vocab_size=about["vocab_size"],
        bytes_per_token=about["validation_bytes"] / max(len(streams["validation"]) - 1, 1),
        description={"task": "huggingface", **about},
    )


def _source(config: DataConfig) -> dict:
    """What decides the tokens."""
    names = ("dataset", "dataset_config", "text_field", "max_bytes", "validation_fraction", "tokenizer")
    fields = {name: getattr(config, name) for name in (*names, "tokenizer_vocab_size")}
    return {**fields, "data_files": list(config.data_files)}


def _tokenize(config: DataConfig, directory: Path) -> dict:
    """Writes tokenizer.json and both streams; returns what there is to know about them."""
    tokenizer = _tokenizer(config)
    tokenizer.save(str(directory / "tokenizer.json"))
    separator, vocab_size = tokenizer.token_to_id(SEPARATOR), tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    edge = np.full(1, separator, dtype)
    num_bytes: dict[Split, int] = {"train": 0, "validation": 0}
    num_skipped = 0
    digest = hashlib.sha256()
    with (directory / "train.tokens").open("wb") as train, (directory / "validation.tokens").open("wb") as validation:
        files = {"train": train, "validation": validation}
        for texts in _batches(_texts(config)):
            documents = list(filter(str.strip, texts))
            num_skipped += len(texts) - len(documents)
            encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
            for document, encoding in zip(documents, encodings, strict=True):
                content = document.encode()
                place = hashlib.sha256(content).digest()
                is_validation = int.from_bytes(place[:8]) / 2**64 < config.validation_fraction
                split: Split = "validation" if is_validation else "train"
                np.concatenate([edge, np.array(encoding.ids, dtype)]).tofile(files[split])
                num_bytes[split] += len(content)
                digest.update(place)
        for file in files.values():
            edge.tofile(file)
    if num_skipped:
        log.warning("skipped %d rows of %s that have no text", num_skipped, config.dataset)
    return {
        "source": _source(config),
        "vocab_size": vocab_size,
        "separator": separator,
        "dtype": dtype.name,
        "train_bytes": num_bytes["train"],
        "validation_bytes": num_bytes["validation"],
        "skipped_rows": num_skipped,
        "sha256": digest.hexdigest(),
        "tokenizer_sha256": hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest(),
    }


def _tokenizer(config: DataConfig) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if config.tokenizer is not None:
        tokenizer = Tokenizer.from_file(config.tokenizer)
        tokenizer.add_special_tokens([SEPARATOR])
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.tokenizer_vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(filter(str.strip, _texts(config)), trainer)
    return tokenizer


def _texts(config: DataConfig) -> Iterator[str]:
    """The text of every row, "" for null, in the order of the data set, until max_bytes are reached."""
    from datasets import load_dataset

    options = {"split": "train", "streaming": config.streaming}
    if config.data_files:
        rows = load_dataset(config.dataset, data_files=list(config.data_files), **options)
    else:
        rows = load_dataset(config.dataset, config.dataset_config, **options)
    total = 0
    for row in rows:
        if config.text_field not in row:
            raise ValueError(f"text_field must be one of {sorted(row)}, got text_field={config.text_field!r}")
        text = "" if row[config.text_field] is None else row[config.text_field]
        if not isinstance(text, str):
            raise ValueError(
                f"text_field must name a column of text, got text_field={config.text_field!r} with {text!r}"
            )
        total += len(text.encode())
        if total > config.max_bytes:
            return
        yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _DOCUMENTS_AT_A_TIME)):
        yield batch
