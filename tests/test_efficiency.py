"""The benchmark's bookkeeping; how fast anything is, is not tested."""

import json

import pytest

from experiments.commands import benchmark
from experiments.preset import DecodingConfig, EfficiencyConfig
from experiments.studies import decoding


def test_ratios_are_those_of_the_medians_and_dense_stops_where_told(tmp_path, capsys):
    config = EfficiencyConfig((64, 128), longest_dense=64, longest_dense_backward=64, block_size=16, top_k=2, repeats=2)
    benchmark(config, tmp_path / "benchmark.json")
    numbers = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(row["sequence_length"], row["pass"]) for row in numbers["rows"]] == [
        (64, "forward"),
        (64, "forward+backward"),
        (128, "forward"),
        (128, "forward+backward"),
    ]
    for row in numbers["rows"][:2]:
        assert row["speedup_over_dense"] == pytest.approx(row["dense_ms"] / row["moba_ms"])
        assert row["moba_temp_mib"] > 0
        assert row["moba_first_ms"] > row["moba_ms"]  # tracing and compiling are in it
    for row in numbers["rows"][2:]:
        assert row["dense_ms"] is row["dense_first_ms"] is row["speedup_over_dense"] is None
        assert row["moba_peak_mib"] is None or row["moba_peak_mib"] > 0  # known on Linux alone
    # 64 queries see 1, 2, 2, 2 blocks of 16 keys; 2 heads, 4 * 64 operations a pair.
    flops = 4 * 64 * 2 * 16 * (16 * 1 + 48 * 2)
    first = numbers["rows"][0]
    assert first["achieved_gflops"] == pytest.approx(flops / first["moba_ms"] / 1e6)
    printed = capsys.readouterr().out
    assert numbers["about"]["jax"] in printed
    assert "matmul_gflops" in printed


def test_bytes_of_a_step_are_those_of_its_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoding, "in_fresh_process", lambda function, *arguments: function(*arguments))
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "block_size": 16, "top_k": 4, "prefill_chunk": 48}
    config = DecodingConfig(100, groups=(3,), steps=2, repeats=1, **sizes)
    benchmark(EfficiencyConfig(), tmp_path / "decode.json", decode=True, decoding_config=config)
    numbers = json.loads((tmp_path / "decode.json").read_text())
    # Two key heads: means of 7 blocks, 8 numbers each; chosen blocks of 16 keys and values, 8 numbers each.
    means, block = 2 * 7 * 8 * 4, 2 * 16 * (8 + 8) * 4
    (row,) = numbers["rows"]
    assert row["needed_bytes"] == means + 10 * block  # three heads choose three each besides their common own one
    assert row["read_bytes"] == means + 12 * block
    assert row["dense_bytes"] == 2 * 112 * (8 + 8) * 4
    assert row["speedup_over_dense"] == pytest.approx(row["dense_ms"] / row["moba_ms"])
    assert row["chunks_over_whole"] == pytest.approx(row["chunks_ms"] / row["whole_ms"])
    assert decoding.needed_bytes(config, 1) == means + 4 * block
    assert "6:2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_length"):
        DecodingConfig(max_length=100)
