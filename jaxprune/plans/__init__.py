"""Plans: what is kept of a network, as plain data, and what follows from it.

A :class:`Plan` names groups of a :class:`jaxprune.structure.Graph` and the
indices kept of each, the blocks it drops, and the resolution of its input. It
is data: JSON, hashable, comparable. From it follow the masks of the full
network, the smaller pytree (:func:`shrink`), the smaller function
(:func:`specialise`) and the proof that the two compute what the masked network
computes (:func:`jaxprune.plans.proof.check`). A :func:`supernet` computes all
plans of a graph in one compile.
"""

from jaxprune.plans import recovery as recovery
from jaxprune.plans.cutting import grow as grow
from jaxprune.plans.cutting import leaf_masks as leaf_masks
from jaxprune.plans.cutting import masks as masks
from jaxprune.plans.cutting import shrink as shrink
from jaxprune.plans.differences import Change as Change
from jaxprune.plans.differences import Diff as Diff
from jaxprune.plans.plan import FORMAT as FORMAT
from jaxprune.plans.plan import Plan as Plan
from jaxprune.plans.plan import compose as compose
from jaxprune.plans.plan import diff as diff
from jaxprune.plans.plan import from_json as from_json
from jaxprune.plans.plan import from_kept as from_kept
from jaxprune.plans.plan import from_masks as from_masks
from jaxprune.plans.plan import from_widths as from_widths
from jaxprune.plans.plan import kept_indices as kept_indices
from jaxprune.plans.plan import open_blocks as open_blocks
from jaxprune.plans.plan import to_json as to_json
from jaxprune.plans.plan import vanished as vanished
from jaxprune.plans.plan import widths as widths
from jaxprune.plans.proof import CheckError as CheckError
from jaxprune.plans.proof import Proof as Proof
from jaxprune.plans.proof import check as check
from jaxprune.plans.running import at as at
from jaxprune.plans.running import masked as masked
from jaxprune.plans.running import specialise as specialise
from jaxprune.plans.running import supernet as supernet
from jaxprune.plans.states import Cut as Cut
from jaxprune.plans.states import register_state as register_state
