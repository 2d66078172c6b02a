"""Cost: what a network of any widths costs, exactly, without a run.

Multiply-adds, parameters and bytes are polynomials in the widths of the groups,
made once from a graph and evaluated by arithmetic: in exact integers, or as a
jnp function. On them rests :func:`plan`, which meets a budget rather than a
ratio.
"""

from jaxprune.cost.latency import Table as Table
from jaxprune.cost.latency import measure as measure
from jaxprune.cost.latency import predict as predict
from jaxprune.cost.planning import Budget as Budget
from jaxprune.cost.planning import Reached as Reached
from jaxprune.cost.planning import budget as budget
from jaxprune.cost.planning import plan as plan
from jaxprune.cost.planning import reached as reached
from jaxprune.cost.polynomials import Polynomial as Polynomial
from jaxprune.cost.polynomials import evaluate as evaluate
from jaxprune.cost.steps import Assume as Assume
from jaxprune.cost.totals import COUNTS as COUNTS
from jaxprune.cost.totals import Layer as Layer
from jaxprune.cost.totals import activation_bytes as activation_bytes
from jaxprune.cost.totals import (
  activation_bytes_polynomials as activation_bytes_polynomials,
)
from jaxprune.cost.totals import layers as layers
from jaxprune.cost.totals import macs as macs
from jaxprune.cost.totals import macs_polynomial as macs_polynomial
from jaxprune.cost.totals import parameters as parameters
from jaxprune.cost.totals import parameters_polynomial as parameters_polynomial
from jaxprune.cost.totals import variables as variables
from jaxprune.cost.totals import weight_bytes as weight_bytes
from jaxprune.cost.totals import (
  weight_bytes_polynomial as weight_bytes_polynomial,
)
