"""Scheduling and kernels for block-sparse attention. Takes raw arrays; knows nothing of the packages above it."""
