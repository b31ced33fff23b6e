"""Steps in a process of their own, so that one that hangs or crashes is reported and the rest still done."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Step = dict[str, Any]


def run_steps(
    run: Callable[[Step], dict[str, Any]], steps: Iterable[Step], seconds: float, deadline: float
) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Every step with its outcome, in order and as they come; a step is asked for when the one before is done.

    One process runs step after step, for starting JAX takes long; a new one begins behind a step that ended it.

    Args:
      run: does a step; importable, for it is called in a fresh process.
      steps: what it is called with.
      seconds: after which a step counts as hung.
      deadline: of `time.monotonic`; a step that would begin later is left out, one that is running then is stopped.

    Returns:
      What `run` returned, or {"refused": why}, {"failed": why} or {"left_out": why}.
    """
    worker: _Worker | None = None
    try:
        for step in steps:
            left = deadline - time.monotonic()
            if left <= 0:
                yield step, {"left_out": "the time was up"}
                continue
            worker = worker or _Worker(run)
            outcome = worker.ask(step, min(seconds, left))
            if outcome is None and left > seconds:
                outcome = {"failed": f"hung: no answer in {seconds:.0f} s"}
                worker.stop()
            elif outcome is None:
                outcome = {"left_out": "the time was up"}
                worker.stop()
            if not worker.process.is_alive():
                worker = None
            yield step, outcome
    finally:
        if worker is not None:
            worker.stop()


class _Worker:
    """A fresh process that runs steps."""

    def __init__(self, run: Callable[[Step], dict[str, Any]]):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, step: Step, seconds: float) -> dict[str, Any] | None:
        """The outcome; None if there is none by then."""
        try:
            self.connection.send(step)
            return self.connection.recv() if self.connection.poll(seconds) else None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            return {"failed": f"crashed: the process ended with status {self.process.exitcode}"}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, run: Callable[[Step], dict[str, Any]]) -> None:
    while True:
        try:
            step = connection.recv()
        except EOFError:
            return
        try:
            outcome = run(step)
        except NotImplementedError as error:
            outcome = {"refused": str(error)[:300]}
        except Exception as error:  # the others are done all the same
            outcome = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        connection.send(outcome)
