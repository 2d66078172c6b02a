"""Checks of what a caller gives, before any trace, each with one line.

Numbers and plain data here; kinds of argument by their annotations in
:mod:`jaxprune.checks.kinds`; packages that are optional in
:mod:`jaxprune.checks.extras`.
"""

from jaxprune.checks.numbers import dumps as dumps
from jaxprune.checks.numbers import has_each as has_each
from jaxprune.checks.numbers import is_static as is_static
from jaxprune.checks.numbers import loads as loads
from jaxprune.checks.numbers import real as real
from jaxprune.checks.numbers import sparsity as sparsity
from jaxprune.checks.numbers import whole as whole
