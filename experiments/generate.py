"""What a trained model goes on with, as text or token ids."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from experiments.config import DataConfig
from experiments.data import text
from experiments.data.huggingface import SEPARATOR
from experiments.train import load_run
from sparse_attn.nn import Sampling


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How a run's tokens are read and written.

    Attributes:
      encode: from what a user writes to token ids.
      decode: back; tokens that have no meaning are left out.
      separator: tokens that stand before a document, and end the one before.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    separator: tuple[int, ...] = ()


def load_vocabulary(config: DataConfig, run_dir: Path) -> Vocabulary:
    """The vocabulary of a run: bytes for text, the run's tokenizer for huggingface, token ids for the other tasks.

    Raises:
      ValueError: the run's tokenizer is missing.
      ImportError: `tokenizers`, of the extra "huggingface", is missing.
    """
    if config.task == "text":
        return Vocabulary(lambda prompt: list(prompt.encode()), _decode_bytes, (text.SEPARATOR,))
    if config.task == "huggingface":
        from tokenizers import Tokenizer

        path = run_dir / "data" / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"run_dir must hold the tokenizer that its model was trained with, got no {path}")
        tokenizer = Tokenizer.from_file(str(path))
        separator = tokenizer.token_to_id(SEPARATOR)
        return Vocabulary(lambda prompt: tokenizer.encode(prompt).ids, tokenizer.decode, (separator,))
    return Vocabulary(functools.partial(_read_ids, task=config.task), lambda tokens: " ".join(map(str, tokens)))


def stream_text(
    run_dir: Path, prompt: str, *, max_new_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str] = ()
) -> Iterator[str]:
    """Yields what the newest checkpoint of a run goes on with behind a prompt, piece by piece.

    It ends at max_new_tokens, at the end of the document, or with a token of `stop`.

    Raises:
      ValueError: run_dir holds no run with a checkpoint, or an argument has a wrong value.
    """
    config, model = load_run(run_dir)
    vocabulary = load_vocabulary(config.data, run_dir)
    tokens = [*vocabulary.separator, *vocabulary.encode(prompt)]
    if not tokens:
        raise ValueError(f"prompt must hold a token for data.task={config.data.task!r}, got an empty one")
    stops = list(vocabulary.separator)
    for each in stop:
        ids = vocabulary.encode(each)
        if len(ids) != 1:
            raise ValueError(f"stop must name single tokens, got {each!r} of {len(ids)} tokens")
        stops += ids
    key = jax.random.key(seed)
    steps = model.stream([tokens], max_new_tokens=max_new_tokens, sampling=sampling, key=key, stop_tokens=stops)

    found: list[int] = []
    shown = ""
    for step in steps:
        if step[0] not in vocabulary.separator:
            found.append(int(step[0]))
        readable = vocabulary.decode(found)
        if not readable.endswith("\N{REPLACEMENT CHARACTER}"):  # else the next token may complete a character
            yield readable[len(shown) :]
            shown = readable
    yield vocabulary.decode(found)[len(shown) :]


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < text.SEPARATOR).decode(errors="replace")


def _read_ids(prompt: str, task: str) -> list[int]:
    try:
        return [int(word) for word in prompt.split()]
    except ValueError:
        raise ValueError(
            f"prompt and stop must be token ids, with spaces between them, for data.task={task!r}, got {prompt!r}"
        ) from None
