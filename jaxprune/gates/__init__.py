"""Learnable gates: neurons, filters, layers and blocks in one objective.

Every gate is a number theta that training moves beside the weights. At each
forward pass it says whether its unit is open, and by what its output is
multiplied; the loss has the expected cost of what is open in it::

  loss = task(scaled params, batch) + strength * remaining cost

so that weights and gates are pruned while they learn, in one optax chain::

  values = gates.evaluate(p['gates'], structure)
  seen = scale(p['params'], values.units, values.blocks)
  rho = gates.remaining(values, structure, cost)
  loss = task(seen, batch) + gates.penalty(rho, strength, target=0.2)

The structure is plain data and the network has no gate layers. ``scale`` (that
of :mod:`jaxprune.structure`) multiplies the gates of units into the rows of the
kernels that read them and the gates of blocks into the leaves that close them:
each acts at one place of every path, where it is also folded in the end. A norm
over the very units that have gates counts a closed one still: ``scale`` refuses
those groups (``graph.uncloseable``), and says how a supernet closes them.

Four granularities: a *unit* is a neuron or a filter; a *layer* is a branch that
stands beside others and ends in groups of its own (an inception module), or a
sequential layer behind a :func:`bypass`; a *block* is a residual branch. Gates
nest: a unit works if it is open and all that it lies in.

References:
  Haider and Taj (2020), arXiv:2010.02623: the four granularities, learned
  scaling factors, one objective and pruning at every forward pass are theirs
  (abstract); every formula here is ours.
"""

from jaxprune.gates.bypasses import bypass as bypass
from jaxprune.gates.bypasses import nothing as nothing
from jaxprune.gates.bypasses import shortcut as shortcut
from jaxprune.gates.forward import closed as closed
from jaxprune.gates.forward import evaluate as evaluate
from jaxprune.gates.forward import init as init
from jaxprune.gates.forward import masks as masks
from jaxprune.gates.functions import Function as Function
from jaxprune.gates.functions import binary as binary
from jaxprune.gates.functions import scale as scale
from jaxprune.gates.functions import sharp as sharp
from jaxprune.gates.objective import partition as partition
from jaxprune.gates.objective import penalty as penalty
from jaxprune.gates.objective import remaining as remaining
from jaxprune.gates.objective import slimming as slimming
from jaxprune.gates.objective import widths as widths
from jaxprune.gates.records import Cost as Cost
from jaxprune.gates.records import Gates as Gates
from jaxprune.gates.records import Scalars as Scalars
from jaxprune.gates.records import Structure as Structure
from jaxprune.gates.records import Values as Values
