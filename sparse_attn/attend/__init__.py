"""Attention over a choice: the two forms of a choice, the backends that compute it, and its derivatives.

choice        what is attended: lists of blocks per query, or a table of tiles and blocks
derivatives   the `Backend` protocol, and the one place where backends meet JAX's autodiff
platform      the backend is settled for the platform that a program is compiled for
backends      the backends and their names
route         the router of the XLA backend
per_query     its attention to choices made by every query
per_tile      its attention to choices made per tile
per_key       attention to lists of single keys
partial       attention over some of the keys, and how partial results merge
"""
