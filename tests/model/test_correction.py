"""The local correction: which workloads it interpolates between, and errors of what was left out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rampwrap.model.correction import Smoother, _non_negative, nearness, spread_out

seeds = st.integers(0, 2**32 - 1)


def test_nearness_is_one_over_one_and_the_distance() -> None:
    queries, support = np.array([[0.0, 0.0], [1.0, 3.0]]), np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, 3.0]])
    np.testing.assert_allclose(nearness(queries, support), [[1, 1 / 3, 1 / 5], [1 / 5, 1 / 3, 1 / 3]])


@given(seeds, st.integers(1, 30), st.integers(1, 12))
def test_support_covers_the_rest(seed: int, rows: int, size: int) -> None:
    """All where there is room. Else no row is farther from those taken than those taken are from each other."""
    features = np.random.default_rng(seed).integers(0, 40, (rows, 3)).astype(float)
    taken = spread_out(features, size)
    assert len(taken) <= size and (np.diff(taken) > 0).all()
    if rows <= size:
        assert taken.tolist() == list(range(rows))
        return
    apart = np.abs(features[:, None] - features[None]).sum(axis=-1)
    left = apart[:, taken].min(axis=1).max()
    among = apart[np.ix_(taken, taken)] + np.where(np.eye(len(taken)), np.inf, 0)
    assert left <= among.min() and among.min() > 0
    middle = np.abs(features - np.median(features, axis=0)).sum(axis=1)
    assert int(middle.argmax()) in taken


def test_support_begins_with_the_row_farthest_from_the_middle() -> None:
    """And goes on with those farthest from all before."""
    line = np.array([[0.0], [1.0], [4.0], [6.0], [10.0], [10.0]])
    chosen = [spread_out(line, size).tolist() for size in (1, 2, 3, 4, 5)]
    assert chosen == [[0], [0, 4], [0, 2, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]], "the first of those as far"
    assert spread_out(np.ones((5, 2)), 3).tolist() == [0], "rows that are alike are one"


def smoother(seed: int, rows: int, points: int, ridge: float) -> tuple[np.ndarray, np.ndarray, Smoother]:
    rng = np.random.default_rng(seed)
    features = rng.uniform(0, 5, (rows, 2))
    support = features[:points]
    cross, prior = nearness(features, support), nearness(support, support)
    return cross, prior, Smoother.make(cross, prior, ridge)


@given(seeds, st.integers(3, 8), st.sampled_from((0.02, 0.1, 0.5)))
def test_errors_are_those_of_fits_without_the_row(seed: int, rows: int, ridge: float) -> None:
    """In closed form, for single rows and for whole groups."""
    cross, prior, made = smoother(seed, rows, rows - 1, ridge)
    residuals = np.random.default_rng(seed + 1).normal(size=(rows, 2))

    def without(out: np.ndarray) -> np.ndarray:
        kept = np.setdiff1d(np.arange(rows), out)
        weights = np.linalg.solve(cross[kept].T @ cross[kept] + ridge * prior, cross[kept].T @ residuals[kept])
        return residuals[out] - cross[out] @ weights

    for row in range(rows):
        np.testing.assert_allclose(made.held_out(residuals)[row], without(np.array([row]))[0], rtol=1e-4, atol=1e-6)
    groups = np.arange(rows) % 2
    found = made.held_out_groups(residuals, groups)
    for group in (0, 1):
        rows_of = np.flatnonzero(groups == group)
        np.testing.assert_allclose(found[rows_of], without(rows_of), rtol=1e-4, atol=1e-6)


def test_support_points_that_coincide() -> None:
    """The fit stands, as with one of them."""
    cross, prior, _ = smoother(0, 6, 3, 0.1)
    twice = [0, 1, 2, 2]
    one, two = Smoother.make(cross, prior, 0.1), Smoother.make(cross[:, twice], prior[np.ix_(twice, twice)], 0.1)
    np.testing.assert_allclose(one.hat, two.hat, atol=1e-6)
    np.testing.assert_allclose(one.hat, cross @ one.solve)


def test_a_perfect_fit_has_errors_all_the_same() -> None:
    """Its leverage is held below one."""
    made = Smoother(np.eye(2), np.eye(2))
    assert np.isfinite(made.held_out(np.ones((2, 1)))).all()


def test_coefficients_are_not_negative_and_of_least_relative_error() -> None:
    design = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 4.0]])
    np.testing.assert_allclose(_non_negative(design, design @ [3.0, 2.0]), [3.0, 2.0], rtol=1e-9)
    falling = np.array([8.0, 6.0, 4.0, 2.0])
    level = (1 / falling).sum() / (1 / falling**2).sum()
    np.testing.assert_allclose(_non_negative(design, falling), [level, 0.0], rtol=1e-9)
