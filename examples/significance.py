"""Means over seeds, their standard errors, and differences between paired runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """The standard error of a mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def paired_difference(
    values: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray
) -> dict[str, Any]:
    """What ``values`` are above ``reference``, seed by seed; two seeds or more.

    Returns the mean, its standard error, the two-sided p-value of Student's t test and
    the one-sided p-value of the hypothesis that ``values`` are no worse.
    """
    difference = np.asarray(values) - np.asarray(reference)
    if np.ptp(difference) == 0:
        # The test would divide by zero.
        same = float(difference[0] == 0)
        p_two_sided, p_no_worse = same, float(difference[0] >= 0)
    else:
        test = stats.ttest_1samp(difference, 0)
        p_two_sided = float(test.pvalue)
        p_no_worse = float(stats.t.sf(-test.statistic, len(difference) - 1))
    return {
        "mean": float(difference.mean()),
        "standard_error": standard_error(difference),
        "p_two_sided": p_two_sided,
        "p_no_worse": p_no_worse,
    }
