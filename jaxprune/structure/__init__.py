"""Structure: which parameter slices of any JAX function go together."""

from jaxprune.structure.graph import Graph as Graph
from jaxprune.structure.group_rules import Choice as Choice
from jaxprune.structure.group_rules import normalise as normalise
from jaxprune.structure.group_rules import pools as pools
from jaxprune.structure.program.slices import Group as Group
from jaxprune.structure.program.slices import Leaf as Leaf
from jaxprune.structure.program.slices import Member as Member
from jaxprune.structure.queries.gate_points import scale as scale
from jaxprune.structure.queries.input_axes import InputAxis as InputAxis
from jaxprune.structure.queries.input_axes import input_axes as input_axes
from jaxprune.structure.queries.input_axes import n_by_m as n_by_m
from jaxprune.structure.queries.stages import cut as cut
from jaxprune.structure.queries.stages import first_read as first_read
from jaxprune.structure.queries.stages import resized as resized
from jaxprune.structure.queries.wires import unwired as unwired
from jaxprune.structure.queries.wires import wiring as wiring
from jaxprune.structure.rules import Equation as Equation
from jaxprune.structure.rules import elementwise as elementwise
from jaxprune.structure.rules import rule as rule
from jaxprune.structure.sizes import padded as padded
from jaxprune.structure.tracing import trace as trace
from jaxprune.structure.walks.branches import branches as branches
