"""Ctrl-C and SIGTERM as a question that long work asks where it can stop and go on later."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Stopped(KeyboardInterrupt):
    """A signal asked the work to stop; what it needs to go on is on disk.

    Attributes:
      exit_status: 128 plus the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_status = 128 + number


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], int | None]]:
    """Yields a function that gives the number of the signal that asked to stop, Ctrl-C's or SIGTERM, or None.

    The first signal puts the handlers of before back, and so does the end of the block: a second signal does what it
    did before, which for Python's own handlers is to end the process at once. Only the main thread may have handlers;
    in any other the function always gives None.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, _: object) -> None:
        received.append(number)
        put_back()

    try:
        for number in before:
            signal.signal(number, receive)
        yield lambda: received[0] if received else None
    finally:
        put_back()
