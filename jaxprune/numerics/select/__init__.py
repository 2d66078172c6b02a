"""Exact order statistics and exact-count masks, without a sort.

A float is ranked by its *key*, the unsigned integer whose order is the order
of the floats, so that every answer is exact: the k-th largest entry is found
digit by digit from the counts of keys. Two ways lead there and agree on every
bit:

* histograms of 16-bit digits, over blocks that stay in cache: the fast way on
  one CPU device;
* a bisection of the key's bits, which needs nothing but sums: the way of
  accelerators and of sharded arrays, where a pass is one all-reduce of counts
  and no array is gathered.

Entries equal to the threshold are taken by position, lower index first, leaf
by leaf in the order of the pytree; this costs a pass only where there are more
of them than places. Counts are integers throughout.
"""

from jaxprune.numerics.select.top import Method as Method
from jaxprune.numerics.select.top import boundaries as boundaries
from jaxprune.numerics.select.top import kth_largest as kth_largest
from jaxprune.numerics.select.top import top_mask as top_mask
from jaxprune.numerics.select.top import top_masks as top_masks
