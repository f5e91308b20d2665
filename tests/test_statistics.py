"""Intervals cover what they promise, and where they cannot the limits are the ones that are written down."""

import numpy as np
import pytest
from scipy import stats

from benchmark import statistics

TRIALS = 10_000  # the standard error of a coverage of 95% is then 0.2%


def failing(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns of CartPole where one run in five fails altogether."""
    return np.where(rng.random(shape) < 0.2, rng.normal(150, 40, shape), rng.normal(480, 15, shape))


# Distributions of returns, with their means.
RETURNS = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0),
    "moderate tail": (lambda rng, shape: rng.beta(5, 2, shape), 5 / 7),  # skewness -0.6
    "at a ceiling": (lambda rng, shape: rng.beta(20, 1, shape), 20 / 21),  # skewness -1.7
    "some fail": (failing, 0.2 * 150 + 0.8 * 480),
}
COVERED = {  # of means over 3, 5, 10 and 20 seeds, in percent: least and most
    "normal": (93, 97),
    "moderate tail": (93, 97),
    "at a ceiling": (88, 93),
    "some fail": (50, 93),
}


def coverage(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    """Percent of the intervals that hold the truth."""
    return 100 * float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("seeds", [3, 5, 10, 20])
@pytest.mark.parametrize("kind", RETURNS)
def test_coverage_of_means_and_differences(kind, seeds):
    """Differences of variants that behave alike are covered everywhere, means only where runs do not fail."""
    draw, mean = RETURNS[kind]
    ours, theirs = draw(np.random.default_rng(seeds), (2, seeds, TRIALS))
    low, high = statistics.mean_interval(ours)
    least, most = COVERED[kind]
    assert least <= coverage(low, high, mean) <= most
    low, high = statistics.mean_interval(ours - theirs)
    assert 93 <= coverage(low, high, 0) <= 99
    welch = statistics.sum_of_means([(1.0, ours), (-1.0, theirs)], "", seeds)
    assert 93 <= coverage(welch.low, welch.high, 0) <= 99.5


@pytest.mark.parametrize("seeds", [3, 5])
def test_percentile_bootstrap_of_few_seeds_covers_too_little(seeds):
    """Which is why means do not use it."""
    rng = np.random.default_rng(seeds)
    samples = rng.normal(size=(1000, seeds))
    drawn = np.take_along_axis(samples[:, None], rng.integers(0, seeds, (1000, 400, seeds)), 2).mean(2)
    assert 70 < coverage(*np.quantile(drawn, [0.025, 0.975], axis=1), 0) < 86


@pytest.mark.parametrize(("seeds", "least", "most"), [(3, 65, 88), (10, 87, 95)])
def test_coverage_of_interquartile_means(seeds, least, most, monkeypatch):
    """Of two environments with different distributions, resampled each by itself: 75% and 90%, over 1500 trials."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    draw = lambda count: [rng.normal(0, 1, count), rng.beta(5, 2, count) * 3]  # noqa: E731
    truth = statistics.iqm(np.concatenate(draw(400_000)))
    intervals = [statistics.bootstrap_interval(draw(seeds), statistics.iqm) for _ in range(300)]
    assert least <= coverage(*np.array(intervals).T, truth) <= most


def test_intervals_equal_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=7), rng.normal(1, 2, size=7)
    np.testing.assert_allclose(statistics.mean_interval(a), stats.ttest_1samp(a, 0).confidence_interval())
    seeds = range(7)
    paired, test = statistics.difference(dict(zip(seeds, a)), dict(zip(seeds, b))), stats.ttest_rel(a, b)
    np.testing.assert_allclose(paired[1:4], (*test.confidence_interval(), test.pvalue))
    assert (paired.method, paired.seeds) == ("paired t", 7)
    welch = statistics.difference(dict(zip(seeds, a)), dict(zip(range(5, 10), b[:5])))  # two seeds are shared
    test = stats.ttest_ind(a, b[:5], equal_var=False)
    np.testing.assert_allclose(welch[1:4], (*test.confidence_interval(), test.pvalue))
    assert (welch.method, welch.seeds) == ("Welch's t", 5)
    some = statistics.difference(dict(zip(seeds, a)), dict(zip(range(4, 11), b)))  # three are
    assert some.seeds == 3 and some.value == pytest.approx((a[4:] - b[:3]).mean())
    assert statistics.difference({1: 3.0}, {1: 2.0, 2: 4.0}) is None
    samples = rng.normal(size=(12, 3))
    low, high = statistics.interval(samples, "iqm")
    expected = stats.bootstrap((samples,), statistics.iqm, method="percentile", n_resamples=9999, rng=rng)
    np.testing.assert_allclose(low, expected.confidence_interval.low, atol=0.1)
    np.testing.assert_allclose(high, expected.confidence_interval.high, atol=0.1)


def test_no_variation_at_all():
    """As where a flag has no effect, or a task is never solved."""
    same = dict.fromkeys(range(5), -200.0)
    assert statistics.difference(same, same)[:4] == (0, 0, 0, 1)
    assert statistics.difference(dict.fromkeys(range(5), -100.0), same)[:4] == (100, 100, 100, 0)
    assert statistics.difference(same, dict.fromkeys(range(7, 12), -200.0))[:4] == (0, 0, 0, 1)
    assert statistics.mean_interval(np.full(4, 3.0)) == (3, 3)


def test_what_few_seeds_do_not_say():
    for statistic in ("mean", "iqm"):
        assert np.isnan(statistics.interval(np.ones((1, 2)), statistic)).all()
    assert np.isnan(statistics.interval(np.ones((9, 2)), "iqm")).all()
    assert np.isfinite(statistics.interval(np.ones((10, 2)), "iqm")).all()


@pytest.mark.parametrize("seeds", [(4, 5), (10, 10)])
def test_equivalence_errs_in_one_of_twenty(seeds):
    """At most, where the true difference is just the margin; and it finds means that are equal."""
    rng = np.random.default_rng(1)

    def share(difference: float, margin: float) -> float:
        ours, theirs = difference + rng.normal(size=(seeds[0], TRIALS)), rng.normal(size=(seeds[1], TRIALS))
        found = statistics.equivalence(ours, theirs, margin)
        within = (-margin < found.low) & (found.high < margin)
        np.testing.assert_array_equal(found.p < 0.05, within)
        return within.mean()

    assert 0.04 < share(3, 3) < 0.06
    assert 0.04 < share(-3, 3) < 0.06
    assert share(0, 3) > 0.9
    assert share(0, 0.2) < 0.05  # too few seeds for so small a margin


def test_equivalence_of_returns_without_variation():
    assert statistics.equivalence(np.full(3, -200.0), np.full(4, -200.0), 10) == statistics.Estimate(
        0, 0, 0, 0, 3, "two one-sided Welch's t"
    )
    assert statistics.equivalence(np.full(3, -200.0), np.full(4, -190.0), 10).p == 1
    assert statistics.equivalence(np.array([1.0]), np.array([1.0, 2.0]), 10) is None


def test_probability_of_improvement():
    """Of all pairs of runs in an environment, mean over environments; equal runs count half."""
    ours, theirs = [np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0, 5.0])], [np.array([2.0, 0.0, 0.0]), np.zeros(3)]
    estimate = statistics.probability_of_improvement(ours, theirs)
    assert estimate.value == pytest.approx(((1.5 + 6) / 9 + 1) / 2) and np.isnan(estimate.low)
    rng = np.random.default_rng(0)
    estimate = statistics.probability_of_improvement([rng.normal(1, 1, 20)], [rng.normal(0, 1, 20)])
    assert 0.5 < estimate.low < estimate.value < estimate.high < 1
    assert estimate.low < stats.norm.cdf(1 / np.sqrt(2)) < estimate.high


def test_holm():
    """The example of Holm's article, in other numbers: step by step with smaller and smaller factors."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert statistics.holm([0.02, 0.001]) == [True, True] and statistics.holm([0.03, 0.026]) == [False, False]
    assert statistics.holm([]) == [] and statistics.holm([np.nan]) == [False]
    assert statistics.by_chance(40) == "2.0 of 40"


@pytest.mark.parametrize("true_ones", [0, 5])
def test_holm_errs_in_one_of_twenty_families(true_ones):
    """However many effects of a family are real."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(1000):
        p_values = [*np.full(true_ones, 1e-6), *rng.random(20)]
        wrong += any(statistics.holm(p_values)[true_ones:])
    assert 30 <= wrong <= 70
