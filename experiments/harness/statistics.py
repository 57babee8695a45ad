"""Means over seeds, paired differences, and p-values of many comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Values = Sequence[float] | np.ndarray


def standard_error(values: Values) -> float:
    """The standard error of a mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def summary(values: Values, collapsed_below: float) -> dict[str, Any]:
    """What a table says of one accuracy per seed, in percent.

    Args:
      values: (seeds,) accuracies.
      collapsed_below: a seed below this accuracy has collapsed.
    """
    values = np.asarray(values, float)
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        "mean": float(values.mean()),
        "standard_error": standard_error(values),
        "minimum": float(values.min()),
        "lower_quartile": float(lower),
        "median": float(median),
        "upper_quartile": float(upper),
        "collapsed": int((values < collapsed_below).sum()),
        "values": [round(float(value), 4) for value in values],
    }


def paired_difference(values: Values, reference: Values) -> dict[str, float]:
    """What ``values`` are above ``reference``, seed by seed; two seeds or more.

    Returns the mean, its standard error, and the two-sided p-value of Student's t test.
    """
    from scipy import stats

    difference = np.asarray(values, float) - np.asarray(reference, float)
    if np.ptp(difference) == 0:  # the test would divide by zero
        p = float(difference[0] == 0)
    else:
        p = float(stats.ttest_1samp(difference, 0).pvalue)
    return {
        "mean": float(difference.mean()),
        "standard_error": standard_error(difference),
        "p": p,
    }


def interval(mean: float, standard_error: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a mean of ``count`` values."""
    from scipy import stats

    half = float(stats.t.ppf(0.975, count - 1)) * standard_error
    return mean - half, mean + half


def holm(p_values: Values) -> list[float]:
    """p-values corrected for being several, in their order.

    References:
      Holm, A simple sequentially rejective multiple test procedure, Scandinavian
      Journal of Statistics 6, 1979.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(
        np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    )
    return corrected.tolist()


def comparisons(
    values: Mapping[str, Values], references: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Paired differences of all rows of a table to some of them.

    Args:
      values: of each row, one value per seed.
      references: the rows to compare with; those that are missing are left out.

    Returns:
      For each row, for each reference, :func:`paired_difference` with ``p_holm``, which
      is corrected over all comparisons of the table. Two references are compared once.
    """
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in values}
    known = [name for name in references if name in values]
    for name, row in values.items():
        for reference in known:
            earlier = name in known and known.index(name) <= known.index(reference)
            if not earlier and len(row) > 1:
                found[name][reference] = paired_difference(row, values[reference])
    cells = [cell for row in found.values() for cell in row.values()]
    for cell, p in zip(cells, holm([c["p"] for c in cells]), strict=True):
        cell["p_holm"] = p
    return found


def early_stopped(validation: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Test accuracy at the evaluation that validation picks, for each seed.

    Args:
      validation: (seeds, evaluations), what the epoch is picked by; of several that are
        the best the first.
      test: (seeds, evaluations).
    """
    return np.take_along_axis(test, validation.argmax(1)[:, None], axis=1)[:, 0]
