"""Searches for the smaller network: which widths, blocks and resolutions.

:mod:`~jaxprune.search.joint` moves all of them as one vector along a gradient
that :mod:`~jaxprune.search.estimator` estimates from losses,
:mod:`~jaxprune.search.stagewise` trains sub-networks stage by stage and shares
the budget out exactly, :mod:`~jaxprune.search.evolution` is the search to beat.
"""

from jaxprune.search import estimator as estimator
from jaxprune.search import evolution as evolution
from jaxprune.search import joint as joint
from jaxprune.search import stagewise as stagewise
