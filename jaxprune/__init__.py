"""jaxprune: pruning for JAX, from masks to a smaller network.

Four verbs over pytrees: *score* the weights, *mask* the worst, *train* with the
masks in an optax chain or a soft mask in the loss, and *shrink*: remove for
real what was pruned, and prove that the result computes the same.

Beside the names below, ``jaxprune.models``, ``jaxprune.data``, ``jaxprune.io``
and ``jaxprune.report`` are imported on their own.
"""

from jaxprune import cost as cost
from jaxprune import distributions as distributions
from jaxprune import gates as gates
from jaxprune import masks as masks
from jaxprune import numerics as numerics
from jaxprune import plans as plans
from jaxprune import schedules as schedules
from jaxprune import scores as scores
from jaxprune import search as search
from jaxprune import soft as soft
from jaxprune import structure as structure
from jaxprune import transforms as transforms
from jaxprune import tree as tree
from jaxprune.cost import budget as budget
from jaxprune.cost import plan as plan
from jaxprune.plans import shrink as shrink
from jaxprune.plans import specialise as specialise
from jaxprune.plans.proof import check as check
from jaxprune.structure import trace as trace
from jaxprune.transforms import keep_sparse as keep_sparse
from jaxprune.transforms import sparsify as sparsify
from jaxprune.transforms.zeros import check_sparse as check_sparse

__version__ = '0.1.0'
