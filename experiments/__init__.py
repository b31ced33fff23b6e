"""Experiments that show when block-sparse attention works and why: `python -m experiments --help`."""
