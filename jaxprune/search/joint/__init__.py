"""JointPruning: channels, depth and resolution as one vector of numbers.

A :class:`PruningVector` says how many units each group keeps, how many blocks
each stage, and at what side images come in, or every part of the network works;
a :class:`Space` what each of them may be. From a vector follow masks for the
supernet (:func:`masks`), its exact cost without a run (:func:`coster`), and one
plan (:func:`plan`): the first units of each group, the first blocks of each
stage. Losses of vectors move it, by :mod:`jaxprune.search.estimator`, and
:func:`project` ends on the budget.

  space = joint.space(graph, images, sides=(20, 24, 28))
  cost = joint.coster(space)
  u = joint.to_unit(space, joint.uniform(space, cost, 0.25))
  losses = joint.objective(space, loss, cost, 0.25)
  gradient, state = estimator.update(losses, state, u)
  small = joint.plan(space, joint.project(space, cost, 0.25, u))

References:
  Liu et al. (2020), Joint Multi-Dimension Pruning via Numerical Gradient
  Update, arXiv:2005.08931. The vector, its direct optimisation and the three
  dimensions are the paper's; the form of estimate, penalty and projection ours.
"""

from jaxprune.search.joint.networks import supernet as supernet
from jaxprune.search.joint.objective import Coster as Coster
from jaxprune.search.joint.objective import coster as coster
from jaxprune.search.joint.objective import limit as limit
from jaxprune.search.joint.objective import objective as objective
from jaxprune.search.joint.objective import penalty as penalty
from jaxprune.search.joint.objective import project as project
from jaxprune.search.joint.objective import uniform as uniform
from jaxprune.search.joint.objective import whole as whole
from jaxprune.search.joint.vectors import PruningVector as PruningVector
from jaxprune.search.joint.vectors import Space as Space
from jaxprune.search.joint.vectors import from_json as from_json
from jaxprune.search.joint.vectors import from_unit as from_unit
from jaxprune.search.joint.vectors import masks as masks
from jaxprune.search.joint.vectors import parts as parts
from jaxprune.search.joint.vectors import plan as plan
from jaxprune.search.joint.vectors import restrict as restrict
from jaxprune.search.joint.vectors import rounded as rounded
from jaxprune.search.joint.vectors import space as space
from jaxprune.search.joint.vectors import to_json as to_json
from jaxprune.search.joint.vectors import to_unit as to_unit
from jaxprune.search.joint.vectors import unit_range as unit_range
