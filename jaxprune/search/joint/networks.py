"""The network under a pruning vector: one compile for every vector."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import plans
from jaxprune.checks import kinds
from jaxprune.search.joint.vectors import PruningVector, Space, masks, parts
from jaxprune.structure.sizes import padded


@kinds.checked
def supernet(space: Space, *, on_canvas: bool = False) -> Callable[..., Any]:
  """Returns the network under a vector that may be traced.

  Args:
    space: the space, of ``fn(params, *args)``.
    on_canvas: whether the side is traced too. Then images come at the largest
      side, are resized to that of the vector in the corner of a canvas, and
      everything works on that corner alone: one compile for all sides, at the
      cost of the largest. Without it images come at the side of the vector
      (see :func:`jaxprune.structure.sizes.padded.resize`), one compile for
      each. A space with cuts has the first form alone.

  Returns:
    ``call(params, vector, *args)``; a pure function for jit, grad, and vmap
    over vectors, under which the weights stay one.

  Raises:
    ValueError: if the space has cuts, without a canvas; when called, if the
      network has no canvas; it names the operation.
  """
  if space.cuts and not on_canvas:
    raise ValueError(
      f'The sides of {", ".join(parts(space))} are those of a vector that may '
      f'be traced: the supernet of a space with cuts needs on_canvas=True.'
    )
  net = plans.supernet(space.graph)

  def call(params: Any, vector: PruningVector, *args: Any) -> Any:
    return net(params, *masks(space, vector), *args)

  if not on_canvas or not space.sides:
    return call
  fitted: dict[Any, Any] = {}

  def on_any(
    params: Any, vector: PruningVector, images: Any, *args: Any
  ) -> Any:
    switches = masks(space, vector)
    leaves, structure = jax.tree.flatten((params, switches, images, args))
    specs = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in leaves]
    key = structure, tuple(specs)
    if key not in fitted:
      given, (units, blocks), image, rest = structure.unflatten(specs)
      at = lambda side: jax.ShapeDtypeStruct(
        (image.shape[0], side, side, image.shape[3]), image.dtype
      )
      fitted[key] = padded.on_canvas(
        net, [(given, units, blocks, at(s), *rest) for s in space.sides]
      )
    own = [vector.side[name] for name in parts(space)] or [vector.side]
    side = jnp.stack([jnp.asarray(one, jnp.int32) for one in own])
    allowed = jnp.asarray(space.sides, jnp.int32)
    indices = jnp.sum(side[:, None] > allowed[None], axis=1)
    small = padded.resize(images, side[0], space.sides[-1])
    return fitted[key](indices, params, *switches, small, *args)

  return on_any
