"""`Now`: the rows of each branch of a batch."""

from headwater.lens.running.denoising import Now


def test_branches_have_equal_shares_of_the_rows():
    at = Now(0, 1.0, ("unconditional", "conditional"), ("unconditional", "conditional"))
    assert [list(at.rows(name, 6)) for name in at.branches] == [[0, 1, 2], [3, 4, 5]]
