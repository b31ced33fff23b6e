"""Command line: `python -m experiments COMMAND --help` explains every option with its unit."""

import logging
import sys

from experiments.stop import Stopped

COMMANDS = {
    "train": "train one model, or go on with a run that was stopped",
    "evaluate": "evaluate a trained model, at any length and on any task",
    "generate": "let a trained model go on with a prompt",
    "study": "run one study of a preset",
    "reproduce": "run every study of a preset, then write its report",
    "report": "write the report from the studies' files",
    "benchmark": "time and memory against dense attention, training or decoding",
    "verify": "is it right on this machine, and what is fastest? two minutes",
    "on_device": "verify, tune and time the kernels on a lent machine, within a time budget",
    "compare_torch": "time PyTorch's flash attention on the problems of on_device",
    "roofline": "what the GPU kernels should cost, by arithmetic",
    "tpu_report": "static estimates of the TPU kernels; needs no TPU",
}

# The extra that brings an optional package, by the name it is imported by.
EXTRAS = dict.fromkeys(["datasets", "tokenizers"], "huggingface") | dict.fromkeys(
    ["chex", "markdown_it", "matplotlib", "optax", "orbax", "tensorboardX", "tqdm", "tyro"], "experiments"
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
        usage = "\n".join(f"  {name:13} {summary}" for name, summary in COMMANDS.items())
        print(f"usage: python -m experiments COMMAND [OPTIONS]\n\n{usage}\n\nOptions: python -m experiments COMMAND -h")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("experiments").setLevel(logging.INFO)
    name, options = arguments[0], arguments[1:]
    try:  # imports stand here, so that the usage above needs none of them and a missing package is reported below
        if name == "verify":  # for machines that have JAX and none of the extras
            from experiments.kernels import verify

            return verify.main(options)
        if name == "on_device":  # likewise
            from experiments.kernels import on_device

            return on_device.main(options)
        if name == "compare_torch":  # likewise, with PyTorch
            from experiments.kernels import compare_torch

            compare_torch.main(options)
        else:
            import tyro

            from experiments.commands import COMMANDS as commands

            tyro.cli(commands[name], prog=f"python -m experiments {name}", args=options, use_underscores=True)
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
