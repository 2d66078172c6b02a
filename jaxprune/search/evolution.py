"""Searches that a gradient has to beat: at random, and by evolution.

Both draw vectors of a :class:`jaxprune.search.joint.Space` that meet the budget
and ask nothing but their losses.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.checks import kinds
from jaxprune.search import joint
from jaxprune.search.joint import Coster, PruningVector, Space

Score = Callable[[Sequence[PruningVector]], Any]  # -> float [n].


class Candidate(NamedTuple):
  """A vector and its loss."""

  loss: float
  vector: PruningVector


@kinds.checked
def draw(
  space: Space,
  cost: Coster,
  target: float | int,
  rng: np.random.Generator,
  *,
  tolerance: float = 0.05,
) -> PruningVector:
  """Returns a random vector that meets the budget.

  Every coordinate is uniform over its range, then the vector is projected.

  Args:
    space: the space.
    cost: of :func:`jaxprune.search.joint.coster`.
    target: as :func:`jaxprune.search.joint.limit`.
    rng: that draws it.
    tolerance: as :func:`jaxprune.search.joint.project`.
  """
  low, high = joint.unit_range(space)
  unit = jax.tree.map(lambda a, b: rng.uniform(float(a), float(b)), low, high)
  return joint.project(space, cost, target, unit, tolerance=tolerance)


@kinds.checked
def search(
  space: Space,
  cost: Coster,
  target: float | int,
  score: Score,
  rng: np.random.Generator,
  *,
  population: int = 50,
  generations: int = 20,
  parents: int = 10,
  mutations: int = 25,
  crossovers: int = 25,
  rate: float = 0.1,
  tolerance: float = 0.05,
) -> list[list[Candidate]]:
  """Returns the best candidates after every generation, the best first.

  The first generation is drawn at random; with ``generations=1`` that is a
  random search. In every other one, of the best ``parents`` so far some are
  mutated (each coordinate drawn anew with probability ``rate``), some crossed
  (each coordinate from one of two), and all children projected onto the budget.

  Args:
    space: the space.
    cost: of :func:`jaxprune.search.joint.coster`.
    target: as :func:`jaxprune.search.joint.limit`.
    score: vectors -> their losses.
    rng: that draws everything.
    population: vectors of the first generation.
    generations: in all, at least 1.
    parents: kept from one generation to the next.
    mutations: children by mutation.
    crossovers: children by crossing.
    rate: of mutation.
    tolerance: as :func:`jaxprune.search.joint.project`.

  Returns:
    For every generation the ``parents`` best candidates so far.

  Raises:
    ValueError: as :func:`jaxprune.search.joint.project`.

  References:
    The search of MetaPruning (Liu et al., 2019, arXiv:1903.10258, section 3.3),
    with its numbers as defaults; it rejects what exceeds the budget, where we
    project.
  """
  low, high = joint.unit_range(space)
  onto = lambda unit: joint.project(
    space, cost, target, unit, tolerance=tolerance
  )

  def mutated(one: PruningVector) -> PruningVector:
    unit = joint.to_unit(space, one)
    return jax.tree.map(
      lambda u, a, b: (
        rng.uniform(float(a), float(b)) if rng.random() < rate else float(u)
      ),
      unit,
      low,
      high,
    )

  def crossed(one: PruningVector, other: PruningVector) -> PruningVector:
    return jax.tree.map(
      lambda a, b: float(a if rng.random() < 0.5 else b),
      *(joint.to_unit(space, v) for v in (one, other)),
    )

  best: list[Candidate] = []
  found = []
  for generation in range(generations):
    if generation == 0:
      draws = [
        draw(space, cost, target, rng, tolerance=tolerance)
        for _ in range(population)
      ]
    else:
      units = [mutated(_pick(best, rng)) for _ in range(mutations)]
      units += [
        crossed(_pick(best, rng), _pick(best, rng)) for _ in range(crossovers)
      ]
      draws = [onto(unit) for unit in units]
    losses = score(draws)
    best += [Candidate(float(x), v) for x, v in zip(losses, draws, strict=True)]
    best = sorted(best, key=lambda c: c.loss)[:parents]
    found.append(list(best))
  return found


def _pick(best: Sequence[Candidate], rng: np.random.Generator) -> PruningVector:
  return best[int(rng.integers(len(best)))].vector
