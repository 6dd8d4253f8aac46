"""Statistics of paired right-or-wrong answers: intervals and an exact test."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution


def wilson(successes: float, total: int) -> tuple[float, float]:
    """Return Wilson's 95% interval (low, high) of the share successes/total; (0, 1) when the total is 0.

    E. B. Wilson, JASA 22 (1927). Unlike ± 1.96 standard errors it is inside [0, 1], and not empty at a share of 0 or 1.
    """
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + Z95**2 / (2 * total)
    half = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    scale = 1 + Z95**2 / total
    # at 0 and 1 the interval ends at the share itself, which rounding would miss
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def bootstrap_difference(wins: int, ties: int, losses: int, *, samples: int, seed: int) -> tuple[float, float]:
    """Return the 95% percentile interval (low, high) of the mean paired difference (wins − losses)/n over examples.

    An example's difference is +1, 0 or −1, so drawing n examples with replacement is one multinomial draw of the three
    counts. The distribution is that of resampling row by row; the cost does not depend on n. Raises ValueError
    without pairs.
    """
    import numpy as np

    total = wins + ties + losses
    if total == 0:
        raise ValueError("no pairs to resample")
    counts = np.random.default_rng(seed).multinomial(total, [wins / total, ties / total, losses / total], size=samples)
    low, high = np.quantile((counts[:, 0] - counts[:, 2]) / total, [0.025, 0.975])
    return float(low), float(high)


def mcnemar_p(wins: int, losses: int) -> float:
    """Return the exact two-sided McNemar p-value of `wins` against `losses` discordant pairs (1.0 when there are none).

    Q. McNemar, Psychometrika 12 (1947), as the binomial test of wins out of wins + losses at one half.
    """
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    # integers up to the last division: the quotient is correctly rounded for binomials of any size
    return min(1.0, float(2 * tail / 2**total))
