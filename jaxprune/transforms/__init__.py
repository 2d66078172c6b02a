"""Links for optax chains that hold the params sparse, and what they will do.

:func:`sparsify` prunes along a schedule, :func:`keep_sparse` holds given masks,
:func:`rigl` and :func:`set_` move the masks while the network trains;
:func:`decide` tells what a link will do to each leaf before it runs.
"""

from jaxprune.transforms.dynamic import DynamicState as DynamicState
from jaxprune.transforms.dynamic import rigl as rigl
from jaxprune.transforms.dynamic import set_ as set_
from jaxprune.transforms.preview import Decision as Decision
from jaxprune.transforms.preview import decide as decide
from jaxprune.transforms.preview import table as table
from jaxprune.transforms.sparsity import KeepSparseState as KeepSparseState
from jaxprune.transforms.sparsity import SparsifyState as SparsifyState
from jaxprune.transforms.sparsity import keep_sparse as keep_sparse
from jaxprune.transforms.sparsity import mask_moments as mask_moments
from jaxprune.transforms.sparsity import project as project
from jaxprune.transforms.sparsity import soft_shrinkage as soft_shrinkage
from jaxprune.transforms.sparsity import sparsify as sparsify
from jaxprune.transforms.zeros import check_sparse as check_sparse
