"""Lookahead scores: what a weight moves in the layers around it.

Lookahead pruning scores a weight by the change it makes in the product of its
layer with the one before and the one after::

  score(w) = w^2 * P[its input channel] * Q[its output channel]

P is the squared norm of what writes that input channel, Q of what reads that
output channel, normalisations in between included. Which leaf reads and writes
which channels is plain data, a *wiring*: a mapping from the path of a leaf to
a :class:`Wire`. :func:`chain` makes one from a list of paths, and
``jaxprune.structure`` from the trace of any model.
"""

from jaxprune.scores.lookahead.activations import (
  activation_rates as activation_rates,
)
from jaxprune.scores.lookahead.activations import (
  scale_by_activation as scale_by_activation,
)
from jaxprune.scores.lookahead.ranking import Order as Order
from jaxprune.scores.lookahead.ranking import lookahead as lookahead
from jaxprune.scores.lookahead.ranking import lookahead_masks as lookahead_masks
from jaxprune.scores.lookahead.ranking import obd as obd
from jaxprune.scores.lookahead.wiring import Look as Look
from jaxprune.scores.lookahead.wiring import Norm as Norm
from jaxprune.scores.lookahead.wiring import Side as Side
from jaxprune.scores.lookahead.wiring import Wire as Wire
from jaxprune.scores.lookahead.wiring import Wiring as Wiring
from jaxprune.scores.lookahead.wiring import chain as chain
