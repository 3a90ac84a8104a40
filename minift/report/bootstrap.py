"""95 % intervals of a measure on the test rows, and of the difference between two models.

A measure is a ratio of two sums over rows: a mean, or nats / targets. Two things are random: which rows were drawn for
the test, and the seeds of the runs.

- Rows: all models are measured on the same resamples of the rows (Efron and Tibshirani 1993, chapters 6 and 13; paired,
  as in Koehn 2004), so that what makes a row difficult for both models cancels in their difference.
- Seeds: their variance is that of the S measures, divided by S. To resample S seeds as well would make it too small by
  (S - 1) / S: a third with three seeds.
"""

import math
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np

RESAMPLES = 10_000
SEED = 0
CHUNK = 2**20  # drawn rows that exist at one time, so that memory does not grow with the number of rows

Key = TypeVar("Key")
Terms = tuple[np.ndarray, np.ndarray]  # numerators and denominators (S, R) of a measure, for S seeds and R rows
Interval = tuple[float, float]


class Variance(NamedTuple):
    """An estimated variance and its degrees of freedom."""

    value: float
    freedom: int


class Estimate(NamedTuple):
    """A measure of a model, or a difference of two."""

    value: float  # mean over seeds
    replicates: np.ndarray  # (RESAMPLES,) the same on each resample of the rows
    rows: int
    of_seeds: tuple[Variance, ...]  # of each model; () where there is one seed, which says nothing about others


def resampled_sums(values: np.ndarray) -> np.ndarray:
    """Sums over rows of `values` (R, K) in each resample, which draws R rows with replacement: (RESAMPLES, K)."""
    rows, columns = values.shape
    rng = np.random.default_rng(SEED)
    sums = np.empty((RESAMPLES, columns))
    step = max(1, CHUNK // rows)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn = rng.integers(rows, size=(count, rows))
        drawn += rows * np.arange(count)[:, None]  # the resamples are counted apart
        times = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        sums[start : start + count] = times.astype(float) @ values
    return sums


def estimate(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """One measure of one model, from its terms (S, R)."""
    return estimate_all({"": (numerators, denominators)})[""]


def estimate_all(measures: dict[Key, Terms]) -> dict[Key, Estimate]:
    """Each measure of each model, by a key of the caller's choice; all on the same rows and the same resamples."""
    columns = [array for terms in measures.values() for array in terms]
    sums = resampled_sums(np.concatenate(columns).T)
    found, start = {}, 0
    for key, (numerators, denominators) in measures.items():
        seeds, rows = numerators.shape
        middle, end = start + seeds, start + 2 * seeds
        with np.errstate(invalid="ignore"):  # nan: no drawn row has the measure
            values = numerators.sum(1) / denominators.sum(1)  # (S,)
            replicates = (sums[:, start:middle] / sums[:, middle:end]).mean(1)
        of_seeds = (Variance(values.var(ddof=1) / seeds, seeds - 1),) if seeds > 1 else ()
        found[key] = Estimate(float(values.mean()), replicates, rows, of_seeds)
        start = end
    return found


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b, on the same rows and resamples. The seeds of two models are independent, whatever their numbers."""
    return Estimate(a.value - b.value, a.replicates - b.replicates, a.rows, a.of_seeds + b.of_seeds)


def interval(found: Estimate) -> Interval | None:
    """The 95 % interval; None where it is not defined, such as from one row.

    One seed: percentiles of the replicates, a little outside of 2.5 and 97.5 to make up for few rows, as Student's t
    does (expanded percentiles: Hesterberg 2015, What Teachers Should Know About the Bootstrap, section 5.3).
    Several seeds: the variances of rows and of seeds are added, see `t_interval`. Both hold the interaction of rows
    and seeds, so the interval is rather too wide than too narrow (Owen 2007, The pigeonhole bootstrap).
    """
    replicates = found.replicates[np.isfinite(found.replicates)]
    if found.rows < 2 or not len(replicates):
        return None
    scale = found.rows / (found.rows - 1)  # the variance of a resample is smaller by this factor
    if found.of_seeds:
        of_rows = Variance(scale * replicates.var(), found.rows - 1)
        return t_interval(found.value, (of_rows, *found.of_seeds))
    tail = NormalDist().cdf(-math.sqrt(scale) * t_quantile(found.rows - 1))
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def t_interval(value: float, variances: tuple[Variance, ...]) -> Interval:
    """The 95 % interval of a value whose variance is a sum, with the degrees of freedom of Satterthwaite 1946."""
    total = sum(variance.value for variance in variances)
    if total == 0:
        return value, value
    freedom = total**2 / sum(variance.value**2 / variance.freedom for variance in variances)
    half = t_quantile(freedom) * math.sqrt(total)
    return value - half, value + half


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, for any real number of degrees of freedom from 1."""
    freedom = min(freedom, 1000.0)  # there it is 1.962; a normal distribution has 1.960
    angles = np.linspace(0, math.pi / 2, 20_001)  # t = sqrt(freedom) tan(angle): its density is cos^(freedom - 1)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(0.95 * mass[-1], mass, angles)
    return math.sqrt(freedom) * math.tan(angle)
