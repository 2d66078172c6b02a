"""Structure: which parameter slices of any JAX function go together."""

from jaxprune.structure.branches import branches as branches
from jaxprune.structure.choices import Choice as Choice
from jaxprune.structure.choices import normalise as normalise
from jaxprune.structure.choices import pools as pools
from jaxprune.structure.gating import scale as scale
from jaxprune.structure.graph import Graph as Graph
from jaxprune.structure.inputs import InputAxis as InputAxis
from jaxprune.structure.inputs import input_axes as input_axes
from jaxprune.structure.inputs import n_by_m as n_by_m
from jaxprune.structure.rules import Equation as Equation
from jaxprune.structure.rules import elementwise as elementwise
from jaxprune.structure.rules import rule as rule
from jaxprune.structure.slices import Group as Group
from jaxprune.structure.slices import Leaf as Leaf
from jaxprune.structure.slices import Member as Member
from jaxprune.structure.stages import cut as cut
from jaxprune.structure.stages import first_read as first_read
from jaxprune.structure.stages import resized as resized
from jaxprune.structure.tracing import trace as trace
from jaxprune.structure.wires import unwired as unwired
from jaxprune.structure.wires import wiring as wiring
