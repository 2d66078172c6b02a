"""Images and labels from TFDS folders without TensorFlow, in a fixed order.

A small set is read whole (:func:`load`) and stays on the device; a large one
is streamed (:func:`stream`). In both, the examples of a step and how they are
augmented depend on nothing but (seed, epoch, step): a run resumes by its step,
there is no other state. :func:`save` makes a folder of arrays.
"""

from jaxprune.data.folders import DataError as DataError
from jaxprune.data.order import epoch_batches as epoch_batches
from jaxprune.data.order import eval_batches as eval_batches
from jaxprune.data.order import step_key as step_key
from jaxprune.data.saving import save as save
from jaxprune.data.sets import Dataset as Dataset
from jaxprune.data.sets import count as count
from jaxprune.data.sets import load as load
from jaxprune.data.sets import records as records
from jaxprune.data.streams import prefetch as prefetch
from jaxprune.data.streams import stream as stream
