"""Generation: prompts of any lengths, continued token by token by one compiled step.

A prompt goes through the model in chunks, then every token by itself: the same function, compiled for a chunk and for a
token. Rows grow apart by num_new, which is 0 for a row that is done.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Required, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from sparse_attn.checks import check_integers, check_positive
from sparse_attn.decode.cache import Cache

if TYPE_CHECKING:  # it imports this file
    from sparse_attn.nn.transformer import Transformer

Prompts: TypeAlias = ArrayLike | Sequence[Sequence[int]]  # int [batch, longest], or a list of token ids a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from softmax(logits / temperature), cut to top_k and then to top_p.

    Source of top_p: nucleus sampling (arXiv 1904.09751).

    Attributes:
      temperature: 0 takes the likeliest token, whatever the other fields are.
      top_k: likeliest tokens that may be drawn (more where the last ones tie); None: all.
      top_p: only the likeliest tokens whose probabilities first sum to at least this may be drawn; from above 0 to 1.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got temperature={self.temperature}")
        if self.top_k is not None:
            check_positive("top_k", self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1, got top_p={self.top_p}")

    def filter(self, logits: jax.Array) -> jax.Array:
        """Logits float32 `[batch, vocab_size]` over temperature (above 0), the largest 0; -inf: not to be drawn."""
        logits = (logits - logits.max(-1, keepdims=True)) / self.temperature
        if self.top_k is not None:
            least = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            order = jnp.argsort(-logits, axis=-1)
            probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
            is_kept = probability.cumsum(-1) - probability < self.top_p  # what comes before does not suffice
            is_kept = jnp.put_along_axis(jnp.zeros_like(is_kept), order, is_kept, axis=-1, inplace=False)
            logits = jnp.where(is_kept, logits, -jnp.inf)
        return logits

    def draw(self, logits: jax.Array, key: jax.Array | None) -> jax.Array:
        """The next tokens int32 `[batch]`, of logits float32 `[batch, vocab_size]`; key for a temperature above 0."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        assert key is not None
        return jax.random.categorical(key, self.filter(logits)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Generated:
    """What prompts were continued by.

    Attributes:
      tokens: int32 `[batch, max_new_tokens]`, -1 behind the end of a row.
      num_generated: int32 `[batch]`, tokens of each row, its stop token included.
    """

    tokens: np.ndarray
    num_generated: np.ndarray


class Options(TypedDict, total=False):
    """The arguments of `stream` but the model and the prompts; max_new_tokens alone has no default."""

    max_new_tokens: Required[int]
    lengths: ArrayLike | None
    sampling: Sampling
    key: jax.Array | None
    stop_tokens: Sequence[int]
    prefill_chunk: int
    max_length: int | None


def stream(
    model: "Transformer",
    prompts: Prompts,
    *,
    max_new_tokens: int,
    lengths: ArrayLike | None = None,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 512,
    max_length: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts and yields the tokens as they come.

    Not to be called inside jit: it is a loop over a compiled step, whose cache is donated from one to the next. Equal
    batch size, max_length, prefill_chunk and sampling share the compiled programs, whatever the prompts' lengths are.
    The arguments are checked at once, the model is called when the first token is asked for.

    Args:
      model: the model.
      prompts: int `[batch, longest]`, rows padded at the end, with `lengths`; or one sequence of token ids a row.
      max_new_tokens: most tokens to generate for each row.
      lengths: int `[batch]`, real tokens of each row of an array, at least 1; None: all.
      sampling: how a token is drawn; the likeliest is taken unless said otherwise.
      key: of the random numbers; needed for a temperature above 0. The same key gives the same tokens.
      stop_tokens: tokens that end their row, as the last of it.
      prefill_chunk: tokens of a prompt that go through the model at a time; the last chunk is padded to as many.
      max_length: tokens that a row's cache can hold; None: as many as needed, the longest prompt and what is generated
        but the last token. Say it to use one compilation for prompts of all lengths.

    Returns:
      An iterator over int32 `[batch]`, at most max_new_tokens of them: the next token of every row, -1 for a row that
      has ended. It ends when all rows have.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value, or prompts and max_new_tokens exceed max_length.
    """
    tokens, lengths = _check_prompts(prompts, lengths, model.config.vocab_size)
    check_positive("max_new_tokens", max_new_tokens)
    check_positive("prefill_chunk", prefill_chunk)
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"key must be given to sample, got key=None and temperature={sampling.temperature}")
    needed = int(lengths.max()) + max_new_tokens - 1
    max_length = needed if max_length is None else max_length
    if max_length < needed:
        raise ValueError(
            f"max_length must be at least {needed} for a prompt of {lengths.max()} tokens and {max_new_tokens=}, got "
            f"max_length={max_length}"
        )
    key = key if sampling.temperature > 0 else None
    model = model.unstacked() if model.config.scan_layers else model
    graph, state = nnx.split(model)
    advance = functools.partial(_advance, state, key, graph=graph, sampling=sampling)

    def steps() -> Iterator[np.ndarray]:
        cache = model.init_cache(len(tokens), max_length)
        hidden = jnp.zeros((len(tokens), model.config.hidden_size), model.config.dtype)
        for start in range(0, int(lengths.max()), prefill_chunk):
            chunk = np.zeros((len(tokens), prefill_chunk), np.int32)
            piece = tokens[:, start : start + prefill_chunk]
            chunk[:, : piece.shape[1]] = piece
            num_new = np.clip(lengths - start, 0, prefill_chunk)
            token, hidden, cache = advance(np.int32(0), (hidden, cache), chunk, num_new)
        token = np.asarray(token)
        yield token
        for step in range(1, max_new_tokens):
            is_done = (token < 0) | np.isin(token, stop_tokens)
            if is_done.all():
                return
            num_new = (~is_done).astype(np.int32)
            following, hidden, cache = advance(np.int32(step), (hidden, cache), np.maximum(token, 0)[:, None], num_new)
            token = np.where(is_done, np.int32(-1), following)
            yield token

    return steps()


def collect(model: "Transformer", prompts: Prompts, **options: Unpack[Options]) -> Generated:
    """`stream`, collected."""
    steps = np.stack(list(stream(model, prompts, **options)), axis=1)  # [batch, steps]
    tokens = np.full((len(steps), options["max_new_tokens"]), -1, np.int32)
    tokens[:, : steps.shape[1]] = steps
    return Generated(tokens, (tokens >= 0).sum(1, dtype=np.int32))


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnums=3)
def _advance(
    state: nnx.State,
    key: jax.Array | None,
    step: jax.Array,
    carried: tuple[jax.Array, tuple[Cache, ...]],
    tokens: jax.Array,
    num_new: jax.Array,
    *,
    graph: nnx.GraphDef,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, tuple[Cache, ...]]:
    """Takes the first num_new `[batch]` of tokens `[batch, tokens]` in and draws the tokens that follow each row.

    Args:
      carried: what the last layer gave for the last token of each row, `[batch, hidden_size]`, and the cache.

    Returns:
      The tokens int32 `[batch]`, and what is carried on.
    """
    model: Transformer = nnx.merge(graph, state)
    last, cache = carried
    hidden, cache = model.extend(tokens, cache, num_new)
    newest = jnp.take_along_axis(hidden, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)[:, 0]
    last = jnp.where((num_new > 0)[:, None], newest, last)
    logits = model.logits(last[:, None])[:, 0]
    key = None if key is None else jax.random.fold_in(key, step)
    return sampling.draw(logits, key), last, cache


def _check_prompts(prompts: Prompts, lengths: ArrayLike | None, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens `[batch, longest]` and lengths `[batch]`."""
    if isinstance(prompts, Sequence):
        if lengths is not None:
            raise ValueError("lengths must be None for prompts that are a list: each of its rows has a length")
        rows = [np.asarray(row, None if len(row) else np.int32) for row in prompts]
        lengths = np.array([row.size for row in rows], np.int32)
        tokens = np.zeros((len(rows), max(lengths, default=0)), np.result_type(np.int32, *rows))
        for row, place in zip(rows, tokens, strict=True):
            place[: row.size] = row
    else:
        tokens = np.asarray(prompts)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"prompts must be integers [batch, longest], got {tokens.dtype}{tokens.shape}")
    given = check_integers("lengths", lengths, tokens.shape[:1])
    counts = np.full(len(tokens), tokens.shape[1]) if given is None else np.asarray(given)
    if counts.min() < 1 or counts.max() > tokens.shape[1]:
        raise ValueError(f"lengths must lie between 1 and {tokens.shape[1]}, got {counts.tolist()}")
    is_real = np.arange(tokens.shape[1]) < counts[:, None]
    tokens = np.where(is_real, tokens, 0)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"prompts must hold token ids from 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
        )
    return tokens.astype(np.int32), counts.astype(np.int32)
