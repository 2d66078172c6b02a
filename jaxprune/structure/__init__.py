"""Structure: which parameter slices of any JAX function go together."""

from jaxprune.structure.graph import Graph as Graph
from jaxprune.structure.slices import Group as Group
from jaxprune.structure.slices import Leaf as Leaf
from jaxprune.structure.slices import Member as Member
from jaxprune.structure.tracing import trace as trace
from jaxprune.structure.wires import wiring as wiring
