"""95 % intervals: against closed forms, against scipy, and their coverage on simulated data."""

import math

import numpy as np
import pytest
from scipy import stats

from minift.report import bootstrap
from minift.report.bootstrap import Estimate, Variance, difference, estimate, estimate_all, interval, t_interval

ROWS = 200


def mean_of(values):
    """The estimate of a mean, of values (S, R)."""
    values = np.atleast_2d(values)
    return estimate(values, np.ones_like(values))


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(1).normal(5.0, 2.0, ROWS)
    low, high = interval(mean_of(values))
    expected = stats.t.interval(0.95, ROWS - 1, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.01)  # its half is 0.28
    assert mean_of(values).value == values.mean()


def test_a_paired_difference_has_the_variance_of_the_differences():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0.0, 3.0, ROWS)  # of each row, for both models
    a, b = difficulty + rng.normal(0.2, 0.1, ROWS), difficulty + rng.normal(0.0, 0.1, ROWS)
    found = estimate_all({"a": (a[None], np.ones((1, ROWS))), "b": (b[None], np.ones((1, ROWS)))})
    low, high = interval(difference(found["a"], found["b"]))
    expected = stats.t.interval(0.95, ROWS - 1, (a - b).mean(), stats.sem(a - b))
    assert (low, high) == pytest.approx(expected, abs=0.001)  # its half is 0.02; without pairs it would be 0.6
    assert interval(found["a"])[1] - interval(found["a"])[0] > 0.7


def test_a_ratio_of_sums_is_that_of_scipy():
    rng = np.random.default_rng(3)
    targets = rng.integers(1, 60, ROWS).astype(float)
    nats = [targets * rng.gamma(2.0, 0.5, ROWS) for _ in range(2)]
    a, b = (estimate(one[None], targets[None]) for one in nats)

    def ratio_difference(one, other, count, axis):
        return one.sum(axis) / count.sum(axis) - other.sum(axis) / count.sum(axis)

    # percentiles as far out as ours, see `interval`
    tail = stats.norm.cdf(-math.sqrt(ROWS / (ROWS - 1)) * stats.t.ppf(0.975, ROWS - 1))
    scipys = stats.bootstrap((*nats, targets), ratio_difference, paired=True, vectorized=True, n_resamples=10_000,
                             method="percentile", confidence_level=1 - 2 * tail, rng=np.random.default_rng(4))
    found = interval(difference(a, b))
    assert found == pytest.approx(tuple(scipys.confidence_interval), abs=0.008)  # its half is 0.14
    assert difference(a, b).replicates.std() == pytest.approx(scipys.standard_error, rel=0.02)


def coverage(estimates):
    """The share of 95 % intervals that hold 0."""
    intervals = [interval(one) for one in estimates]
    return sum(low <= 0 <= high for low, high in intervals) / len(intervals)


def simulate(make, count=400):
    """Estimates from data sets (S, R) of mean 0. That all have the same resamples is fast. The standard error of a
    coverage is 1.1 %."""
    data = {i: make() for i in range(count)}
    return list(estimate_all({i: (values, np.ones_like(values)) for i, values in data.items()}).values())


def test_one_seed_covers_95_percent():
    rng = np.random.default_rng(5)
    assert 0.925 <= coverage(simulate(lambda: rng.normal(size=(1, 100)))) <= 0.975
    few = simulate(lambda: rng.normal(size=(1, 8)))
    plain = np.array([np.quantile(one.replicates, [0.025, 0.975]) for one in few])
    plain_coverage = ((plain[:, 0] <= 0) & (plain[:, 1] >= 0)).mean()
    assert plain_coverage + 0.02 < coverage(few) <= 0.975


@pytest.mark.parametrize("row, seed, both, least, most", [
    (1.0, 0.0, 0.0, 0.925, 0.98),  # the seed changes nothing
    (0.1, 1.0, 0.0, 0.925, 0.98),  # it changes all rows alike, and rows hardly differ
    (1.0, 0.1, 0.0, 0.925, 0.98),
    (1.0, 0.07, 1.0, 0.94, 1.0),  # each run errs in other rows
])  # fmt: skip
def test_three_seeds_cover_95_percent(row, seed, both, least, most):
    rng = np.random.default_rng(6)

    def make():
        return rng.normal(0, row, (1, 40)) + rng.normal(0, seed, (3, 1)) + rng.normal(0, both, (3, 40))

    assert least <= coverage(simulate(make)) <= most


def test_the_noise_of_seeds_of_both_models_counts():
    """Rows are equal, so the interval is Welch's."""
    a, b = np.array([1.0, 1.2, 1.7]), np.array([0.3, 0.35, 0.5, 0.2])
    estimates = [mean_of(np.repeat(values[:, None], 50, 1)) for values in (a, b)]
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert interval(difference(*estimates)) == pytest.approx(tuple(expected), rel=1e-6)
    variances = tuple(Variance(values.var(ddof=1) / len(values), len(values) - 1) for values in (a, b))
    assert t_interval(a.mean() - b.mean(), variances) == pytest.approx(tuple(expected), rel=1e-6)


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 2.7, 5, 30, 199, 900])
def test_the_quantile_of_t(freedom):
    assert bootstrap.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)


def test_all_models_get_the_same_resamples_whatever_the_chunks(monkeypatch):
    values = np.random.default_rng(7).normal(size=(37, 2))
    sums = bootstrap.resampled_sums(values)
    assert sums.shape == (10_000, 2)
    np.testing.assert_allclose(bootstrap.resampled_sums(values[:, 1:]), sums[:, 1:])
    monkeypatch.setattr(bootstrap, "CHUNK", 1000)  # as if there were many rows
    np.testing.assert_allclose(bootstrap.resampled_sums(values), sums)
    np.testing.assert_allclose(bootstrap.resampled_sums(np.ones((37, 1))), 37)  # each draws as many rows as there are


def test_where_there_is_no_interval():
    assert interval(mean_of([[3.0]])) is None  # one row
    assert interval(mean_of([[3.0, 3.0, 3.0]])) == (3.0, 3.0)
    assert interval(Estimate(1.0, np.full(10, np.nan), 4, ())) is None
    names = np.array([[0.0, 0.0, 5.0, 4.0]])  # some resamples draw no row with names
    low, high = interval(estimate(names * [[0, 0, 0.2, 0.5]], names))
    assert 0.19 < low < high < 0.51
