"""What each primitive does to axis types, and to its own static sizes."""

from jaxprune.structure.rules import contractions as contractions
from jaxprune.structure.rules import layout as layout

# The families register their rules when they are imported.
from jaxprune.structure.rules import parts as parts
from jaxprune.structure.rules import reductions as reductions
from jaxprune.structure.rules.base import Equation as Equation
from jaxprune.structure.rules.base import Value as Value
from jaxprune.structure.rules.base import elementwise as elementwise
from jaxprune.structure.rules.base import infer as infer
from jaxprune.structure.rules.base import lock_all as lock_all
from jaxprune.structure.rules.base import rule as rule
from jaxprune.structure.rules.contractions import contraction as contraction
from jaxprune.structure.rules.primitives import TABLE as TABLE
