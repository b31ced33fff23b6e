"""TPU kernels on a CPU: the interpreter simulates memories, copies and semaphores, and is as strict as it can be."""

import pytest


@pytest.fixture
def interpret(capfd):
    """Parameters of the interpreter: memory starts as NaN, reads out of bounds raise, and races fail the test."""
    from jax.experimental.pallas import tpu as pltpu

    yield pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    assert "RACE DETECTED" not in capfd.readouterr().out  # newer versions raise instead
