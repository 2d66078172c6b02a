"""JointPruning: channels, depth and resolution as one vector of numbers.

A :class:`PruningVector` says how many units each group keeps, how many blocks
each stage, and at what side images come in, or every part of the network works;
a :class:`Space` what each of them may be. From a vector follow masks for the
supernet (:func:`masks`), its exact cost without a run (:func:`coster`), and one
plan (:func:`plan`): the first units of each group, the first blocks of each
stage. Losses of vectors move it, by :mod:`jaxprune.estimator`, and
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

from jaxprune.joint.budgets import Coster as Coster
from jaxprune.joint.budgets import coster as coster
from jaxprune.joint.budgets import limit as limit
from jaxprune.joint.budgets import objective as objective
from jaxprune.joint.budgets import penalty as penalty
from jaxprune.joint.budgets import project as project
from jaxprune.joint.budgets import uniform as uniform
from jaxprune.joint.budgets import whole as whole
from jaxprune.joint.networks import supernet as supernet
from jaxprune.joint.vectors import PruningVector as PruningVector
from jaxprune.joint.vectors import Space as Space
from jaxprune.joint.vectors import from_json as from_json
from jaxprune.joint.vectors import from_unit as from_unit
from jaxprune.joint.vectors import masks as masks
from jaxprune.joint.vectors import parts as parts
from jaxprune.joint.vectors import plan as plan
from jaxprune.joint.vectors import restrict as restrict
from jaxprune.joint.vectors import rounded as rounded
from jaxprune.joint.vectors import space as space
from jaxprune.joint.vectors import to_json as to_json
from jaxprune.joint.vectors import to_unit as to_unit
from jaxprune.joint.vectors import unit_range as unit_range
