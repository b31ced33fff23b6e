"""Data: what the tasks ask, that batches are functions of (seed, split, step), and who stands on which side."""

import dataclasses
import doctest
import itertools
import json
import sys
import sysconfig
import types
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments.config import DataConfig
from experiments.data import huggingface, make_data, text
from experiments.data.text import SEPARATOR, near_duplicates, python_source

SMALL = DataConfig(
    sequence_length=44, batch_size=5, num_keys=12, num_values=9, num_fillers=7, num_pairs=6, max_bytes=400_000
)
NEEDLE = dataclasses.replace(SMALL, task="needle", num_queries=2)
TEXT = dataclasses.replace(SMALL, task="text", packages=())


@pytest.mark.parametrize("config", [SMALL, NEEDLE, TEXT], ids=lambda config: config.task)
def test_batch_is_a_function_of_seed_split_and_step(config):
    data, again, other = make_data(config, 1), make_data(config, 1), make_data(config, 2)
    for split in ("train", "validation"):
        first = [data.batch(step, split)["tokens"] for step in (0, 1, 5)]
        second = [again.batch(step, split)["tokens"] for step in (5, 1, 0)][::-1]
        np.testing.assert_array_equal(first, second)
        assert all((a != b).any() for a, b in itertools.combinations(first, 2))
        seeds_agree = (other.batch(0, split)["tokens"] == first[0]).all()
        assert seeds_agree == (split == "validation")


@pytest.mark.parametrize("config", [SMALL, NEEDLE, TEXT], ids=lambda config: config.task)
def test_shapes_and_ranges(config):
    data = make_data(config, 0)
    for split in ("train", "validation"):
        for name, array in data.batch(3, split).items():
            assert array.shape == (config.batch_size, config.sequence_length)
            assert array.dtype == (np.float32 if name == "depth" else np.int32)
            assert array.min() >= (-1 if name in ("targets", "depth") else 0)
            assert array.max() < (data.vocab_size if name in ("tokens", "targets") else np.inf)


@hypothesis.given(
    num_pairs=st.integers(2, 9),
    spare_keys=st.integers(0, 5),
    spare_tokens=st.integers(0, 11),
    sizes=st.tuples(*[st.integers(1, 8)] * 3),
    step=st.integers(0, 1000),
    split=st.sampled_from(["train", "validation"]),
)
def test_recall_asks_every_key_of_the_first_half_once_for_its_value(
    num_pairs, spare_keys, spare_tokens, sizes, step, split
):
    batch_size, num_values, num_fillers = sizes
    config = DataConfig(
        num_pairs=num_pairs,
        num_keys=num_pairs + spare_keys,
        sequence_length=4 * num_pairs + spare_tokens,
        batch_size=batch_size,
        num_values=num_values,
        num_fillers=num_fillers,
    )
    batch = make_data(config, 0).batch(step, split)
    for row, target in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        is_key = [token < config.num_keys for token in row]
        first_question = min(i for i in range(len(row)) if target[i] >= 0)
        assert 2 * (config.sequence_length // 4) <= first_question
        pairs = {row[i]: row[i + 1] for i in range(first_question) if is_key[i]}
        asked = {row[i]: target[i] for i in range(first_question, len(row)) if is_key[i]}
        assert asked == pairs
        assert 2 <= len(pairs) <= num_pairs
        assert split == "train" or len(pairs) == num_pairs
        assert sum(is_key) == 2 * len(pairs) == 2 * sum(each >= 0 for each in target)
        assert all(config.num_keys <= value < config.num_keys + num_values for value in pairs.values())
        assert sum(token >= config.num_keys + num_values for token in row) == len(row) - 3 * len(pairs)  # filler


def test_training_draws_every_number_of_pairs():
    data = make_data(SMALL, 0)
    counts = {int((row >= 0).sum()) for step in range(20) for row in data.batch(step, "train")["targets"]}
    assert counts == {2, 3, 4, 5, 6}


def test_needle_asks_at_the_end_and_says_how_deep_the_answer_is():
    data = make_data(NEEDLE, 0)
    last_slot = NEEDLE.sequence_length // 2 - NEEDLE.num_queries - 1
    for step in range(10):
        batch = data.batch(step, "validation")
        for row, target, depth in zip(batch["tokens"], batch["targets"], batch["depth"], strict=True):
            places = np.flatnonzero(target >= 0)
            np.testing.assert_array_equal(places, [40, 42])
            assert (row < NEEDLE.num_keys).sum() == NEEDLE.num_pairs + NEEDLE.num_queries
            for place in places:
                [where] = np.flatnonzero(row[:40] == row[place])
                assert row[where + 1] == target[place]
                assert depth[place] == np.float32(where / 2 / last_slot)
            assert (depth[target < 0] == -1).all()


def test_needles_hide_at_every_depth():
    config = dataclasses.replace(NEEDLE, num_pairs=1, num_queries=1, batch_size=500)
    batch = make_data(config, 0).batch(0, "validation")
    counts = np.histogram(batch["depth"][batch["targets"] >= 0], bins=5, range=(0, 1))[0]
    assert (np.abs(counts - 100) < 45).all()  # five standard deviations of a binomial of 500 and 1/5


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, num_pairs=12),  # 11 slots
        dataclasses.replace(SMALL, num_pairs=1),
        dataclasses.replace(NEEDLE, num_pairs=13),  # 12 keys
        dataclasses.replace(NEEDLE, num_queries=7),
    ],
)
def test_pairs_that_do_not_fit_are_an_error(config):
    with pytest.raises(ValueError, match="num_pairs="):
        make_data(config, 0)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 60 files in three near-identical copies each, one of them not UTF-8."""
    rng = np.random.default_rng(0)
    for number in range(60):
        lines = [f"file_{number} = {value}" for value in rng.integers(10**9, size=40)]
        for copy in range(3):
            lines[copy] = f"copy_{copy}_of_{number} = True"
            (tmp_path / f"module_{number}_{copy}.py").write_text("\n".join(lines))
    (tmp_path / "latin.py").write_bytes(b"name = 'caf\xe9, not UTF-8'\n" * 20)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("never_read = True\n" * 20)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    return tmp_path


def documents_of(data, split):
    stream = data._streams[split]
    edges = np.flatnonzero(stream == SEPARATOR)
    assert edges[0] == 0
    assert edges[-1] == len(stream) - 1
    return [stream[a + 1 : b].astype(np.uint8).tobytes() for a, b in itertools.pairwise(edges)]


def test_near_duplicates_stand_on_one_side_and_every_file_is_read(library):
    data = python_source(dataclasses.replace(TEXT, validation_fraction=0.3), 0)
    train, validation = documents_of(data, "train"), documents_of(data, "validation")
    files = {path.read_bytes() for path in library.glob("*.py")}
    assert set(train) | set(validation) == files
    assert len(train) + len(validation) == len(files) == data.description["files"] == 181
    originals = [{content.splitlines()[5] for content in side} for side in (train, validation)]
    assert originals[0].isdisjoint(originals[1])
    assert 8 <= len(originals[1]) <= 28  # of 61 groups, 0.3 +- 0.16
    assert data.bytes_per_token == sum(map(len, validation)) / (len(data._streams["validation"]) - 1)


def test_max_bytes_is_kept_and_too_little_text_is_an_error(library):
    data = python_source(dataclasses.replace(TEXT, max_bytes=60_000, validation_fraction=0.3), 0)
    assert 55_000 < data.description["train_bytes"] + data.description["validation_bytes"] <= 60_000
    with pytest.raises(ValueError, match="max_bytes"):
        python_source(dataclasses.replace(TEXT, max_bytes=2_000), 0)
    with pytest.raises(ValueError, match="no_such_package"):
        python_source(dataclasses.replace(TEXT, packages=("no_such_package",)), 0)


def test_near_duplicates_are_those_of_a_brute_force_comparison():
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(30):
        lines = [f"value = {value}" for value in rng.integers(10**9, size=50)]
        for kept in (50, 45, 10):  # Jaccard index with the first: 1, 0.82, 0.11
            new = [f"value = {value}" for value in rng.integers(10**9, size=50 - kept)]
            documents.append("\n".join(lines[:kept] + new).encode())
    order = rng.permutation(len(documents))
    documents = [documents[i] for i in order]
    sets = [set(document.splitlines()) for document in documents]
    expected = [
        next(j for j, other in enumerate(sets) if len(each & other) / len(each | other) >= 0.5) for each in sets
    ]
    assert near_duplicates(documents) == expected


def test_shared_licences_do_not_make_duplicates():
    licence = "\n".join(f"# paragraph {i} of a licence" for i in range(15))
    documents = [f"{licence}\nonly_in_{i} = {i}_000_000".encode() for i in range(60)]
    assert near_duplicates(documents) == list(range(60))


def test_examples_in_docstrings():
    assert doctest.testmod(text) == (0, 2)


def test_documents_do_not_mix(library):
    """Segment ids and targets against a walk through the stream, token by token."""
    data = python_source(dataclasses.replace(TEXT, sequence_length=1500, batch_size=3), 0)
    batch = data.batch(0, "train")
    stream = data._streams["train"].tolist()
    whole = " ".join(map(str, stream))
    for tokens, targets, segments in zip(
        *(batch[k].tolist() for k in ("tokens", "targets", "segment_ids")), strict=True
    ):
        assert tokens[1:] == targets[:-1]
        assert " ".join(map(str, [*tokens, targets[-1]])) in whole
        expected = [0]
        for token in tokens:
            expected.append(expected[-1] + (token == SEPARATOR))
        assert segments == expected[1:]
        assert segments[-1] > 0


def test_an_epoch_visits_every_sequence_once(library):
    config = dataclasses.replace(TEXT, sequence_length=500, batch_size=1)
    data = python_source(config, 0)
    count = len(data._streams["train"]) // 500 - 1
    starts = [[data._start("train", epoch * count + i) for i in range(count)] for epoch in range(2)]
    for epoch in starts:
        np.testing.assert_array_equal(np.diff(sorted(epoch)), 500)
        assert max(epoch) + 501 <= len(data._streams["train"])
    assert starts[0] != starts[1]


@pytest.fixture
def rows(monkeypatch):
    """Rows of a data set, and in the place of the optional packages a tokenizer of bytes with the separator 256."""
    rows = []

    class Tokenizer:
        def save(self, path):
            Path(path).write_text("{}")

        def token_to_id(self, token):
            return 256

        def get_vocab_size(self):
            return 257

        def encode_batch(self, documents, add_special_tokens):
            return [types.SimpleNamespace(ids=list(document.encode())) for document in documents]

    datasets = types.SimpleNamespace(load_dataset=lambda *_, **__: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(huggingface, "_tokenizer", lambda config: Tokenizer())
    return rows


def test_rows_without_text_are_skipped_and_counted(rows, tmp_path, caplog):
    texts = [f"document {i}" * 5 for i in range(100)]
    rows += [{"text": text} for text in (None, "", *texts[:50], None, " \n", *texts[50:], None)]
    config = dataclasses.replace(SMALL, task="huggingface")
    data = make_data(config, 0, tmp_path)
    assert sorted(documents_of(data, "train") + documents_of(data, "validation")) == sorted(t.encode() for t in texts)
    assert data.description["skipped_rows"] == 5
    assert "skipped 5 rows" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"), [(None, "must be below half of the 1 tokens"), (3, "must name a column of text.* with 3")]
)
def test_data_set_without_any_text_is_an_error(rows, tmp_path, text, message):
    rows += [{"text": text}] * 10
    with pytest.raises(ValueError, match=message):
        make_data(dataclasses.replace(SMALL, task="huggingface"), 0, tmp_path)


def test_huggingface_reads_local_files_with_a_trained_tokenizer(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    words = [*(f"word{i}" for i in range(50)), "naïve", "日本"]
    texts = [" ".join(rng.choice(words, 30)) for _ in range(200)]
    rows = [None, *texts[:20], None, *texts[20:]]  # null is skipped
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"content": each}) + "\n" for each in rows))
    config = dataclasses.replace(
        SMALL,
        task="huggingface",
        dataset="json",
        data_files=(str(tmp_path / "corpus.jsonl"),),
        text_field="content",
        tokenizer_vocab_size=320,
    )
    data = make_data(config, 0, tmp_path / "run")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "run" / "data" / "tokenizer.json"))
    separator = tokenizer.token_to_id("<|document|>")
    found, ratios = [], []
    for split in ("train", "validation"):
        stream = np.array(data._streams[split])
        edges = np.flatnonzero(stream == separator)
        decoded = [tokenizer.decode(stream[a + 1 : b].tolist()) for a, b in itertools.pairwise(edges)]
        ratios.append(sum(len(each.encode()) for each in decoded) / (len(stream) - 1))
        found += decoded
    assert sorted(found) == sorted(texts)
    assert data.description["skipped_rows"] == 2
    assert data.bytes_per_token == ratios[1]
    assert data.vocab_size == tokenizer.get_vocab_size() <= 320
    (tmp_path / "corpus.jsonl").unlink()  # a resumed run reads what is in its directory
    again = make_data(config, 0, tmp_path / "run")
    np.testing.assert_array_equal(again.batch(2, "train")["tokens"], data.batch(2, "train")["tokens"])
    with pytest.raises(ValueError, match="must hold the tokens of"):
        make_data(dataclasses.replace(config, max_bytes=10_000), 0, tmp_path / "run")
    loaded = dataclasses.replace(config, tokenizer=str(tmp_path / "run" / "data" / "tokenizer.json"), streaming=False)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"content": each}) + "\n" for each in texts))
    same = make_data(loaded, 0, tmp_path / "loaded")
    np.testing.assert_array_equal(same.batch(2, "train")["tokens"], data.batch(2, "train")["tokens"])
    parquet = dataclasses.replace(config, dataset="parquet", data_files=(str(_parquet(tmp_path)),))
    with pytest.raises(ValueError, match=r"text_field must be one of \['other'\]"):
        make_data(parquet, 0, tmp_path / "other")


def _parquet(directory):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"other": ["a", "b"]}), directory / "corpus.parquet")
    return directory / "corpus.parquet"
