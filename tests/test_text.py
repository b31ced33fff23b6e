"""Text that a trained model writes: vocabularies, and characters of several bytes on their way to the terminal."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import generate
from experiments.config import DataConfig, RunConfig
from experiments.data import huggingface
from sparse_attn.nn import Sampling


class Writer:
    """A model that writes given tokens."""

    def __init__(self, tokens):
        self.tokens, self.config = tokens, SimpleNamespace(vocab_size=320)

    def stream(self, prompts, *, max_new_tokens, stop_tokens, **_):
        self.prompts = prompts
        for token in self.tokens[:max_new_tokens]:
            yield np.array([token], np.int32)
            if token in stop_tokens:
                return


def write(monkeypatch, tokens, stop=()):
    model = Writer(tokens)
    monkeypatch.setattr(generate, "load_run", lambda run_dir: (RunConfig(data=DataConfig(task="text")), model))
    pieces = list(generate.stream_text("", "é", max_new_tokens=9, sampling=Sampling(), seed=0, stop=stop))
    return model.prompts, pieces


def test_text_comes_in_whole_characters_and_ends_with_the_document(monkeypatch):
    prompts, pieces = write(monkeypatch, [*"aü∑".encode(), 300, 256, 98])
    assert prompts == [[256, *"é".encode()]]
    assert list(filter(None, pieces)) == ["a", "ü", "∑"]
    _, pieces = write(monkeypatch, [97, 98, 99, 100], stop=("b",))
    assert "".join(pieces) == "ab"
    _, pieces = write(monkeypatch, [97, *"ü".encode()[:1]])
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="stop"):
        write(monkeypatch, [97], stop=("ü",))


def test_the_tokenizer_of_a_run_reads_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(huggingface, "_texts", lambda config: iter(["the cat sat on the mat, über alles"] * 9))
    (tmp_path / "data").mkdir()
    config = DataConfig(task="huggingface", tokenizer_vocab_size=300)
    huggingface._tokenizer(config).save(str(tmp_path / "data" / "tokenizer.json"))
    vocabulary = generate.load_vocabulary(config, tmp_path)
    tokens = vocabulary.encode(" the mat, über")
    assert len(tokens) < len(" the mat, über".encode())
    assert vocabulary.decode(tokens) == " the mat, über"
    assert vocabulary.separator == (0,)
    with pytest.raises(ValueError, match="tokenizer"):
        generate.load_vocabulary(config, tmp_path / "data")
