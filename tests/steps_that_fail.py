"""Steps that end in every way, for `tests/test_verify.py`: called in a fresh process, which need not load JAX."""

import os
import time


def run(step):
    match step["do"]:
        case "crash":
            os.abort()
        case "hang":
            time.sleep(60)
        case "refuse":
            raise NotImplementedError("no such chip")
        case "fail":
            raise ValueError("wrong shape")
    return {"process": os.getpid()}
