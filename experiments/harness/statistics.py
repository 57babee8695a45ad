"""Means over seeds, and paired differences."""

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
    """What values are above a reference, seed by seed: mean and standard error."""
    difference = np.asarray(values, float) - np.asarray(reference, float)
    return {
        "mean": float(difference.mean()),
        "standard_error": standard_error(difference),
    }


def interval(mean: float, standard_error: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a mean of ``count`` values."""
    from scipy import stats

    half = float(stats.t.ppf(0.975, count - 1)) * standard_error
    return mean - half, mean + half


def comparisons(
    values: Mapping[str, Values], references: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Paired differences of all rows of a table to some of them.

    Args:
      values: of each row, one value per seed.
      references: the rows to compare with; those that are missing are left out.

    Returns:
      For each row, for each reference, :func:`paired_difference`. Two references are
      compared once, and rows of one seed with nothing.
    """
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in values}
    known = [name for name in references if name in values]
    for name, row in values.items():
        for reference in known:
            earlier = name in known and known.index(name) <= known.index(reference)
            if not earlier and len(row) > 1:
                found[name][reference] = paired_difference(row, values[reference])
    return found


def early_stopped(validation: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Test accuracy at the evaluation that validation picks, for each seed.

    Args:
      validation: (seeds, evaluations), what the epoch is picked by; of several that are
        the best the first.
      test: (seeds, evaluations).
    """
    return np.take_along_axis(test, validation.argmax(1)[:, None], axis=1)[:, 0]
