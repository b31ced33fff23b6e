"""Steps in a process of their own, so that one that hangs or crashes is reported and the rest still done."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

Step = dict[str, Any]


def run_steps(
    run: Callable[[Step], dict[str, Any]], steps: Sequence[Step], seconds: float, deadline: float
) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Every step with its outcome, in order and as they come.

    One process runs step after step, for starting JAX takes long; a new one begins behind a step that ended it.

    Args:
      run: does a step; importable, for it is called in a fresh process.
      steps: what it is called with.
      seconds: after which a step counts as hung.
      deadline: of `time.monotonic`; a step that would begin later is left out, one that is running then is stopped.

    Returns:
      What `run` returned, or {"failed": why}, or {"left_out": why}.
    """
    first = 0
    while first < len(steps):
        if time.monotonic() >= deadline:
            yield steps[first], {"left_out": "the time was up"}
            first += 1
            continue
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        worker = context.Process(target=_work, args=(theirs, run, steps[first:]), daemon=True)
        worker.start()
        theirs.close()
        try:
            while first < len(steps):
                left = deadline - time.monotonic()
                if not ours.poll(max(0.0, min(seconds, left))):
                    is_hung = left > seconds
                    why = f"hung: no answer in {seconds:.0f} s" if is_hung else "the time was up"
                    yield steps[first], {"failed" if is_hung else "left_out": why}
                    first += 1
                    break
                try:
                    outcome = ours.recv()
                except EOFError:
                    worker.join()
                    yield steps[first], {"failed": f"crashed: the process ended with status {worker.exitcode}"}
                    first += 1
                    break
                yield steps[first], outcome
                first += 1
        finally:
            worker.kill()
            worker.join()
            ours.close()


def _work(connection: Connection, run: Callable[[Step], dict[str, Any]], steps: Sequence[Step]) -> None:
    for step in steps:
        try:
            outcome = run(step)
        except NotImplementedError as error:
            outcome = {"refused": str(error)[:300]}
        except Exception as error:  # the others are done all the same
            outcome = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        connection.send(outcome)
