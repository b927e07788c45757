"""Weight scaling of CAST (Huang et al. 2025): learnable magnitudes beside weights that are being shrunk.

The contracted axis of a kernel is divided into `groups` contiguous parts, and every part of every output has
a scale A, 1 at first:

    w = latent * expand(A)        A of shape (groups, out) for a kernel of shape (..., in, out)

The taps of a convolution share their scales. Scales let the kept weights of a row make up at once for those that shrink. They are trained by the inner
optimizer (the paper: Adam) and fold into the weights at the end, where pruned ones stay zero.
"""

import dataclasses

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from sparsejax.masks import flatten, map_with_name, sparsifiable


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightScaling:
    """A parameterization (`sparsejax.parameterizations`) with latent {"params": weights, "scales": A by path}.

    Attributes:
      groups: parts of the contracted axis (-2) with a scale of their own, the paper's n.
      include, exclude: path patterns of the parameters that are scaled, see `masks.sparsifiable`.
    """

    groups: int = 2
    include: tuple[str, ...] = ("*kernel",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"weight scaling needs at least one group, got groups={self.groups}")

    def init(self, key, params):
        """Scales of 1 in the weights' dtype; the key is not used.

        Raises:
          ValueError: if `groups` does not divide the contracted axis of a leaf, naming it.
        """
        del key
        scales = {}
        for name, weight in sparsifiable(params, self.include, self.exclude).items():
            if weight.shape[-2] % self.groups:
                raise ValueError(
                    f"weight scaling in {self.groups} groups needs axis -2 of {name} to be divisible by "
                    f"{self.groups}, but its shape is {tuple(weight.shape)}"
                )
            # the leaf is called `scale`, so that rules for kernels do not take it for one
            path = (*name.split("/"), "scale")
            scales[path] = jnp.ones((self.groups, weight.shape[-1]), weight.dtype)
        return {"params": params, "scales": unflatten_dict(scales)}, {}

    def materialize(self, latent, state, key=None):
        """Scaled weights, no penalty; deterministic with and without a key."""
        return self.fold(latent), state, 0.0

    def masks(self, latent, state):
        """None: scaling moves no zeros."""

    def fold(self, latent):
        """The plain parameters, in which the scales are multiplied into the weights."""
        scales = {name.removesuffix("/scale"): scale for name, scale in flatten(latent["scales"]).items()}

        def scaled(name, weight):
            if name not in scales:
                return weight
            return weight * jnp.repeat(scales[name], weight.shape[-2] // self.groups, axis=0)

        return map_with_name(scaled, latent["params"])
