"""Room for the interpreter of Mosaic GPU kernels: its warpgroups are threads that block one another at barriers.

XLA takes a thread for each core, and two cores are too few for three warpgroups. It reads this when it starts, which no
test module does while it is collected.
"""

import os

os.environ.setdefault("NPROC", "16")
