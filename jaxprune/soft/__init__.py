"""Soft masks: pruning inside the loss, as a function of the weights.

PDP of weights (:func:`pdp`), its optax link (:func:`track_pdp`), PDP of whole
channels (:mod:`jaxprune.soft.channels`), and masks whose gradient is another's
than their value's (:mod:`jaxprune.soft.reparam`).
"""

from jaxprune.soft import channels as channels
from jaxprune.soft import reparam as reparam
from jaxprune.soft.training import TrackPDPState as TrackPDPState
from jaxprune.soft.training import end_warm_up as end_warm_up
from jaxprune.soft.training import is_warm as is_warm
from jaxprune.soft.training import ramp_schedule as ramp_schedule
from jaxprune.soft.training import track_pdp as track_pdp
from jaxprune.soft.training import warn_about as warn_about
from jaxprune.soft.training import with_pdp as with_pdp
from jaxprune.soft.weights import Diagnosis as Diagnosis
from jaxprune.soft.weights import NByM as NByM
from jaxprune.soft.weights import PDPState as PDPState
from jaxprune.soft.weights import diagnose as diagnose
from jaxprune.soft.weights import harden as harden
from jaxprune.soft.weights import mask as mask
from jaxprune.soft.weights import pdp as pdp
from jaxprune.soft.weights import pdp_init as pdp_init
