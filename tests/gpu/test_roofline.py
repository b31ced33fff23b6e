"""The page of arithmetic in the documentation."""

import pathlib

from experiments.kernels import roofline

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_in_the_documentation_is_that_of_the_code():
    assert (ROOT / "docs" / "gpu-roofline.md").read_text() == roofline.table()


def test_pairs_are_counted_as_a_loop_would_count_them():
    problem = roofline.Problem(sequence=64, block_size=8, top_k=3, head_dim=16, batch=1, heads=2)
    assert problem.pairs == 2 * sum(min(query // 8 + 1, 3) for query in range(64))
