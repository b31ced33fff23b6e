"""Studies end to end at the smallest size, and what they measure against loops."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.configs import load_preset
from experiments.data import make_data
from experiments.preset import ComparisonConfig, EfficiencyConfig, Preset, SnrConfig
from experiments.studies import block_size, comparison, key_convolution, language_model, length, snr
from experiments.studies.snr import agreement, find_values, measure_routing, simulate
from experiments.studies.variants import dense, train_variants
from sparse_attn import theory
from sparse_attn.nn import TransformerConfig
from tests import near_ties

MODEL = TransformerConfig(
    vocab_size=30,
    num_layers=2,
    hidden_size=16,
    mlp_size=16,
    num_heads=1,
    head_dim=8,
    window_size=4,
    block_size=4,
    top_k=4,
    key_conv_width=3,
)
RECALL = RunConfig(
    model=MODEL,
    data=DataConfig(sequence_length=32, num_keys=10, num_values=10, num_fillers=10, num_pairs=4, batch_size=4),
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(steps=3, evaluate_batches=1, tensorboard=False),
)
TEXT = dataclasses.replace(
    RECALL,
    model=dataclasses.replace(MODEL, vocab_size=257),
    data=DataConfig(task="text", sequence_length=32, batch_size=2, max_bytes=200_000),
)
MICRO = Preset(
    name="tiny",
    recall=RECALL,
    recall_seeds=(0, 1),
    block_sizes=((8, 2), (4, 4)),
    key_conv_block=(4, 4),
    key_conv_widths=(0, 3),
    lengths=(32, 64),
    language_model=TEXT,
    language_model_seeds=(0,),
    language_model_blocks=((8, 2), (4, 4)),
    snr=SnrConfig(head_dims=(8,), block_sizes=(4,), nums_related=(1,), delta_mus=(1.0,), head_dim=8, block_size=4),
    efficiency=EfficiencyConfig(),
    comparison=ComparisonConfig(sequence_length=32, block_size=8, repeats=1),
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


def test_recall_studies_share_their_runs(out):
    sizes = block_size.run(MICRO, out)
    assert [variant["name"] for variant in sizes["variants"]] == [
        "block8-top2-conv3",
        "block4-top4-conv3",
        "dense-conv3",
    ]
    parameters = {variant["num_parameters"] for variant in sizes["variants"]}
    assert len(parameters) == 1  # the same model but for its attention
    shared = out / sizes["variants"][1]["runs"][0] / "result.json"
    made = shared.stat().st_mtime_ns
    widths = key_convolution.run(MICRO, out)
    assert shared.stat().st_mtime_ns == made
    assert widths["variants"][1]["values"] == sizes["variants"][1]["values"]
    result = json.loads((out / widths["variants"][0]["runs"][1] / "result.json").read_text())
    assert result["evaluation"]["accuracy"] == widths["variants"][0]["values"][1]


def test_length_evaluates_the_trained_models(out):
    lengths = length.run(MICRO, out)
    for variant in lengths["variants"]:
        assert np.shape(variant["values_by_length"]) == (2, 2)
        trained = json.loads((out / variant["runs"][0] / "result.json").read_text())
        np.testing.assert_allclose(variant["values_by_length"][0][0], trained["evaluation"]["accuracy"], atol=1e-6)


def test_snr_measures_every_trained_head(out):
    key_convolution.run(MICRO, out)  # its runs are measured too; read back if they are there
    numbers = snr.run(MICRO, out)
    trained = {row["run"] for row in numbers["trained"]}
    assert len(trained) == 6  # three MoBA variants, two seeds
    assert not any("dense" in run for run in trained)
    assert snr.run(MICRO, out) == numbers  # read back, not measured again


def test_language_models_differ_in_attention_alone(out):
    study = language_model.run(MICRO, out)
    kinds = [(variant["kind"], variant["block_size"], variant["key_conv_width"]) for variant in study["variants"]]
    assert kinds == [("dense", None, 0), ("moba", 8, 0), ("moba", 4, 0), ("moba", 4, 3)]
    assert all(0 < value < 10 for variant in study["variants"] for value in variant["values"])


def test_monte_carlo_agrees_with_theory():
    config = SnrConfig(
        head_dims=(16,), block_sizes=(8,), nums_related=(3,), delta_mus=(1.0,), head_dim=16, block_size=8
    )
    for row in simulate(config):
        for name in ("snr", "failure", "recall"):
            assert abs(row[f"{name}_measured"] - row[f"{name}_theory"]) < 6 * row[f"{name}_spread"] + 1e-3, (name, row)


def test_values_stand_behind_their_keys():
    data = make_data(RECALL.data, 0)
    batch = data.batch(0, "validation")
    places = find_values(batch["tokens"], batch["targets"])
    asked = batch["targets"] >= 0
    rows, _ = np.nonzero(asked)
    np.testing.assert_array_equal(batch["tokens"][rows, places[asked]], batch["targets"][asked])
    assert (places[~asked] == -1).all()


def test_routing_is_measured_as_loops_do():
    rng, block, top_k = np.random.default_rng(0), 4, 3
    query, key = near_ties.eighths(rng.normal(size=(2, 2, 22, 8))).astype(np.float32)
    relevant = np.full((2, 22), -1)
    relevant[:, 12:] = rng.integers(0, 12, size=(2, 10))
    differences, found, predicted_from = [], [], []
    for b in range(2):
        for t in range(12, 22):
            own, target = t // block, relevant[b, t] // block
            score = [query[b, t] @ key[b, n * block : (n + 1) * block].mean(0) for n in range(own)]
            differences += [score[target] - score[n] for n in range(own) if n != target]
            found.append(target in np.argsort(-np.array(score), kind="stable")[: top_k - 1])
            predicted_from.append(own)
    expected = np.mean(differences) / np.std(differences)
    measured = measure_routing(query, key, relevant, block, top_k)
    assert measured["num_queries"] == 20
    np.testing.assert_allclose(measured["snr_measured"], expected, rtol=1e-5)
    np.testing.assert_allclose(measured["recall_measured"], np.mean(found), atol=1e-9)
    recall = np.mean([float(theory.recall_at_k(expected, n, top_k - 1)) for n in predicted_from])
    np.testing.assert_allclose(measured["recall_predicted"], recall, atol=1e-5)


def test_agreement_of_a_perfect_and_a_reversed_prediction():
    rows = [{"recall_measured": x, "recall_predicted": x**2} for x in (0.1, 0.4, 0.9)]
    assert agreement(rows)["rank_correlation"] == pytest.approx(1)
    rows = [{"recall_measured": x, "recall_predicted": 1 - x} for x in (0.1, 0.4, 0.9)]
    assert agreement(rows)["correlation"] == pytest.approx(-1)
    assert agreement(rows[:2])["correlation"] is None


def test_budgets_must_be_equal():
    with pytest.raises(ValueError, match="block_sizes must have one product"):
        dataclasses.replace(MICRO, block_sizes=((8, 2), (4, 8)))
    with pytest.raises(ValueError, match="key_conv_widths must hold 0"):
        dataclasses.replace(MICRO, key_conv_widths=(3, 5))
    with pytest.raises(ValueError, match="preset must be one of"):
        load_preset("huge")


def test_training_side_by_side_gives_the_same_losses(out, tmp_path):
    variant = dense(MODEL)
    train_variants(RECALL, [variant], (0, 1), tmp_path, "recall", "accuracy", processes=2)
    train_variants(RECALL, [variant], (0, 1), out, "recall", "accuracy", processes=1)
    for run in (f"{variant.name}-seed0", f"{variant.name}-seed1"):
        losses = [
            json.loads((folder / "recall" / run / "result.json").read_text())["evaluation"]["loss"]
            for folder in (out, tmp_path)
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)  # one core may add in another order than two


def test_systems_are_compared_with_dense_attention(out, monkeypatch):
    one = [contestant for contestant in comparison.contestants(MICRO.comparison) if contestant.name == "PISA"]
    monkeypatch.setattr(comparison, "contestants", lambda config: one)
    rows = comparison.run(MICRO, out)["rows"]
    assert [(row["model"], row["system"]) for row in rows] == [("recall", "PISA"), ("language model", "PISA")]
    for row in rows:
        assert row["density"] == 0.25  # one block of four
        assert 0 < row["mass_recall"] < 1
        assert row["error"] > 0


def test_a_system_that_attends_everything_has_no_error():
    random = np.random.default_rng(0)
    query, key, value = random.standard_normal((3, 1, 24, 2, 4)).astype(np.float32)
    for contestant in comparison.contestants(MICRO.comparison):
        if contestant.name == "oracle":
            measured = comparison.measure_system(contestant, 3, query, key, value, repeats=1)
            assert measured["density"] == 1
            np.testing.assert_allclose(measured["mass_recall"], 1, rtol=1e-6)
            assert measured["error"] < 1e-6
