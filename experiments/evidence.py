"""What a results table says: means, spreads, and paired differences.

Two methods are compared on the same seeds. A win is claimed only where the mean
of the paired differences exceeds two standard errors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
  """Of one figure over the seeds."""

  mean: float
  sd: float  # With n - 1 in the divisor; nan for a single seed.
  n: int

  def __str__(self) -> str:
    """Returns 'mean ± sd', to two decimals; 'mean' alone of one seed."""
    spread = '' if math.isnan(self.sd) else f' ± {self.sd:.2f}'
    return f'{self.mean:.2f}{spread}'


class Paired(NamedTuple):
  """Of the differences a - b, seed by seed."""

  mean: float
  error: float  # The standard error of the mean, sd / sqrt(n).
  n: int

  @property
  def verdict(self) -> str:
    """'higher', 'lower', or 'level' within two standard errors."""
    if not abs(self.mean) > 2 * self.error:  # Also where the error is nan.
      return 'level'
    return 'higher' if self.mean > 0 else 'lower'

  def __str__(self) -> str:
    """Returns '+mean ± standard error', and a star beyond two of them."""
    star = '' if self.verdict == 'level' else ' *'
    return f'{self.mean:+.2f} ± {self.error:.2f}{star}'


def summary(values: Sequence[float]) -> Summary:
  """Returns the mean and the standard deviation over the seeds.

  Examples:
    >>> print(summary([1.0, 2.0, 3.0]))
    2.00 ± 1.00
  """
  x = np.asarray(values, float)
  sd = float(x.std(ddof=1)) if x.size > 1 else math.nan
  return Summary(float(x.mean()), sd, x.size)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
  """Returns the mean of a - b over the seeds and its standard error.

  Raises:
    ValueError: if the two have not the same seeds.

  Examples:
    >>> print(paired([3.0, 4.0, 6.0], [1.0, 2.0, 3.0]))
    +2.33 ± 0.33 *
    >>> paired([1.0, 2.0], [2.0, 1.0]).verdict
    'level'
  """
  if len(a) != len(b):
    raise ValueError(
      f'A pair needs the same seeds: {len(a)} values against {len(b)}.'
    )
  differences = np.asarray(a, float) - np.asarray(b, float)
  mean, sd, n = summary(differences.tolist())
  return Paired(mean, sd / math.sqrt(n), n)


def subset(labels: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
  """Returns the rows of a fixed subset with equally many of each class.

  Args:
    labels: int[n].
    size: rows to draw; the classes must divide it.
    seed: that draws them.

  Returns:
    int[size], ascending.

  Raises:
    ValueError: if the classes do not divide ``size``, or one is too small.

  Examples:
    >>> labels = np.array([0, 1, 0, 1, 0, 1])
    >>> rows = subset(labels, 4)
    >>> labels[rows].sum()
    np.int64(2)
  """
  classes = np.unique(labels)
  each, rest = divmod(size, len(classes))
  if rest:
    raise ValueError(
      f'A subset of {size} cannot hold {len(classes)} classes equally.'
    )
  rng = np.random.default_rng(seed)
  rows = []
  for label in classes:
    found = np.flatnonzero(labels == label)
    if len(found) < each:
      raise ValueError(
        f'Class {label} has {len(found)} examples, {each} were asked for.'
      )
    rows.append(rng.choice(found, each, replace=False))
  return np.sort(np.concatenate(rows))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """Returns a Markdown table; everything but the first column is right-aligned.

  Examples:
    >>> print(table(['method', 'top-1'], [['pdp', 97.5]]))
    | method | top-1 |
    | --- | ---: |
    | pdp | 97.5 |
  """
  line = lambda cells: '| ' + ' | '.join(str(c) for c in cells) + ' |'
  rule = ['---', *['---:'] * (len(header) - 1)]
  return '\n'.join([line(header), line(rule), *[line(row) for row in rows]])
