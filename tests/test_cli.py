"""The command line: help with units, overrides, errors, and one command's way into the next."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS, EXTRAS, main
from experiments.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from experiments.data.huggingface import _texts
from experiments.data.recall import RecallData

MICRO = {
    "model.num_layers": 1,
    "model.layer_pattern": "dense",
    "model.hidden_size": 16,
    "model.head_dim": 8,
    "model.mlp_size": 16,
    "model.key_conv_width": 0,
    "data.sequence_length": 32,
    "data.batch_size": 2,
    "data.num_pairs": 4,
    "train.steps": 3,
    "train.log_every": 1,
    "train.evaluate_batches": 1,
}
MICRO_FLAGS = ["--train.no_tensorboard", *(f"--{name}={value}" for name, value in MICRO.items())]


def test_no_command_lists_the_commands():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "experiments"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert all(name in done.stdout for name in COMMANDS)
    assert main(["--help"]) == 0
    assert main(["fly"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m experiments {command}" in capsys.readouterr().out


def test_help_explains_every_field_with_its_unit(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    words = re.sub(r"[\s│]+", " ", capsys.readouterr().out).replace("_", "-")
    for part, config in (("data", DataConfig), ("optimizer", OptimizerConfig), ("train", TrainConfig)):
        for field in dataclasses.fields(config):
            name = f"--{part}.{field.name}".replace("_", "-")
            assert name in words
            about = words.split(name)[-1].split("(default:")[0]
            assert about.strip()[-1] in ").", f"{name}: {about}"
            if field.type not in ("bool", bool) and field.name != "task":
                assert re.search(r"\([^)]+\)\.", about), f"{name} says no unit: {about}"
    for field in dataclasses.fields(RunConfig().model):
        assert f"--model.{field.name}".replace("_", "-") in words


def test_train_then_evaluate(tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert main(["train", *MICRO_FLAGS, "--run_dir", run_dir, "--seed", "5", "--optimizer.learning_rate", "0.01"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["config"]["seed"] == 5
    assert result["config"]["optimizer"]["learning_rate"] == 0.01
    assert result["config"]["model"]["layer_pattern"] == ["dense"]
    capsys.readouterr()
    options = ["--task", "needle", "--sequence_lengths", "32", "64", "--num_pairs", "2", "--num_batches", "1"]
    assert main(["evaluate", "--run_dir", run_dir, *options, "--by_generation"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["task"], line["sequence_length"], line["num_targets"]) for line in lines] == [
        ("needle", 32, 2),
        ("needle", 64, 1),
    ]
    for line in lines:
        assert line["generated_accuracy"] == line["accuracy"]
        assert line["generated_agreement"] == 1
    assert main(["evaluate", "--run_dir", run_dir, "--by_generation"]) == 1
    assert "by_generation must be off" in capsys.readouterr().err
    options = ["generate", "--run_dir", run_dir, "--max_new_tokens", "5"]
    assert main([*options, "--prompt", "1 70 2"]) == 0
    written = capsys.readouterr().out.split()
    assert len(written) == 5
    assert main([*options, "--prompt", "1 70 2", "--stop", written[0]]) == 0
    assert capsys.readouterr().out.split() == written[:1]
    for name, bad in (("prompt", ["--prompt", "one"]), ("prompt", []), ("stop", ["--prompt", "1", "--stop", "2 3"])):
        assert main([*options, *bad]) == 1
        assert f"error: {name}" in capsys.readouterr().err
    assert main(["train", *MICRO_FLAGS, "--run_dir", run_dir, "--seed", "6"]) == 1
    assert "seed is 5 there, 6 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data.num_pairs", "3", "--data.sequence_length", "8", "--run_dir", "RUN"], "num_pairs"),
        (["evaluate", "--run_dir", "RUN"], "config.json"),
    ],
)
def test_bad_values_are_an_error_of_one_line(arguments, message, capsys, tmp_path):
    assert main([str(tmp_path) if each == "RUN" else each for each in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["train", "--run_dir"], "run_dir"),
        (["evaluate", "--run_dir"], "run_dir"),
        (["study", "length", "--out"], "out"),
        (["reproduce", "--out"], "out"),
        (["report", "--out"], "out"),
        (["benchmark", "--out"], "out"),
    ],
)
def test_address_of_a_store_is_refused_at_the_start(arguments, option, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "gs://bucket/run"]) == 1
    assert f"error: {option} must be a path of this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("datasets", ["train", "--data.task=huggingface", "--run_dir=RUN"], "huggingface"),
        ("tensorboardX", ["train", *MICRO_FLAGS, "--train.tensorboard", "--run_dir=RUN"], "experiments"),
        ("tyro", ["report"], "experiments"),
    ],
)
def test_missing_package_is_named_with_its_extra(package, arguments, extra, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "datasets":  # the tokenizer's training asks for it; the tokenizers themselves may be missing here
        monkeypatch.setattr("experiments.data.huggingface._tokenizer", lambda config: next(_texts(config)))
    assert main([each.replace("RUN", str(tmp_path / "run")) for each in arguments]) == 1
    error = capsys.readouterr().err
    assert f"error: {package} is not installed: pip install 'sparse-attn-jax[{extra}]'" in error
    assert "Traceback" not in error


def test_tensorboard_switched_off_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["train", *MICRO_FLAGS, "--run_dir", str(tmp_path)]) == 0


def test_missing_package_of_no_extra_is_a_fault_of_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "experiments.commands", None)
    with pytest.raises(ModuleNotFoundError):
        main(["report"])


def test_every_package_of_the_extras_is_known():
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    expected = {}
    for extra in ("experiments", "huggingface"):
        for requirement in extras[extra]:
            name = re.match(r"[\w-]+", requirement).group()
            imported = {"markdown-it-py": "markdown_it", "orbax-checkpoint": "orbax"}
            expected[imported.get(name, name)] = extra
    assert expected == EXTRAS


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_with_a_checkpoint_and_its_own_exit_status(number, status, capsys, tmp_path, monkeypatch):
    class Interrupted(RecallData):
        def batch(self, step, split, *rows):
            signal.raise_signal(number)
            return super().batch(step, split, *rows)

    with monkeypatch.context() as patch:
        patch.setattr("experiments.data.RecallData", Interrupted)
        assert main(["train", *MICRO_FLAGS, "--run_dir", str(tmp_path)]) == status
    error = capsys.readouterr().err
    assert "after step 1; a checkpoint is in" in error
    assert "To resume: python -m experiments train" in error
    assert main(["train", *MICRO_FLAGS, "--run_dir", str(tmp_path)]) == 0


@pytest.mark.parametrize("flag", ["--model.block_size=few", "--data.task=chess", "--train.stepz=3"])
def test_a_command_line_that_does_not_parse_exits_with_2(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", flag])
    assert stop.value.code == 2
