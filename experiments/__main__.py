"""Command line: `python -m experiments COMMAND --help` explains every option with its unit."""

import importlib
import logging
import sys

from experiments.stop import Stopped

# Where each command lives: its function's signature is its options, its docstring its help. Imported when called.
COMMANDS = {
    "train": ("experiments.train", "train_command", "train one model, or go on with a run that was stopped"),
    "evaluate": ("experiments.evaluate", "evaluate_command", "evaluate a trained model, at any length and on any task"),
    "study": ("experiments.studies", "study", "run one study of a preset"),
    "reproduce": ("experiments.studies", "reproduce", "run every study of a preset, then write its report"),
    "report": ("experiments.report", "report", "write the report of what the studies left in their directories"),
    "benchmark": ("experiments.studies.efficiency", "benchmark", "time and memory against dense attention"),
}

# The extra that brings an optional package, by the name it is imported by.
EXTRAS = dict.fromkeys(["datasets", "tokenizers"], "huggingface") | dict.fromkeys(
    ["chex", "matplotlib", "optax", "orbax", "tensorboardX", "tqdm", "tyro"], "experiments"
)


def main(arguments: list[str]) -> int:
    """Runs one command.

    Args:
      arguments: the command's name and its options.

    Returns:
      Exit status: 0; 1 for a bad value or checkpoint, a loss that is not finite or a package that is missing; 2 for a
      command line that does not parse; 130 for Ctrl-C; 143 for SIGTERM.
    """
    if not arguments or arguments[0] not in COMMANDS:
        usage = "\n".join(f"  {name:10} {summary}" for name, (_, _, summary) in COMMANDS.items())
        print(f"usage: python -m experiments COMMAND [OPTIONS]\n\n{usage}\n\nOptions: python -m experiments COMMAND -h")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("experiments").setLevel(logging.INFO)
    module, function, _ = COMMANDS[arguments[0]]
    try:
        import tyro  # here, where its absence is met

        command = getattr(importlib.import_module(module), function)
        tyro.cli(command, prog=f"python -m experiments {arguments[0]}", args=arguments[1:], use_underscores=True)
    except KeyboardInterrupt as stop:
        print(f"{stop or 'Stopped.'}\nTo resume: python -m experiments {' '.join(arguments)}", file=sys.stderr)
        return stop.exit_status if isinstance(stop, Stopped) else 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"error: {package} is not installed: pip install 'sparse-attn-jax[{EXTRAS[package]}]'", file=sys.stderr)
        return 1
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
