"""Scores: how much each weight matters; the larger is kept.

Every score is a function of the params, some of gradients or activations too,
to a pytree like them. :mod:`jaxprune.scores.lookahead` sees a weight through
the layers around it.
"""

from jaxprune.scores import lookahead as lookahead
from jaxprune.scores.criteria import Hessian as Hessian
from jaxprune.scores.criteria import Loss as Loss
from jaxprune.scores.criteria import fpgm as fpgm
from jaxprune.scores.criteria import grasp as grasp
from jaxprune.scores.criteria import lamp as lamp
from jaxprune.scores.criteria import magnitude as magnitude
from jaxprune.scores.criteria import movement as movement
from jaxprune.scores.criteria import norm_scale as norm_scale
from jaxprune.scores.criteria import obd as obd
from jaxprune.scores.criteria import random as random
from jaxprune.scores.criteria import saliency as saliency
from jaxprune.scores.criteria import snip as snip
from jaxprune.scores.criteria import synflow as synflow
from jaxprune.scores.criteria import taylor as taylor
from jaxprune.scores.criteria import wanda as wanda
