"""SLoRB, the sparse low-rank boosting of AST (Huang et al. 2025): a block-constant branch beside N:M weights.

    y = x (w * m) + (x P) S,    so the layer's weight is    w * m + P S

with P the fixed indicator of blocks of `block` consecutive inputs (in x in / block) and S trained (in / block
x out). S starts as the mean over each block of the pruned weights w * (1 - m), zeros at kept positions
included, which is the least-squares fit of P S to what pruning removes. It costs 1 / block of the layer's
weights; the summary of a run counts them among its parameters, but not in its FLOPs.

The released recipe may train P as well; here it stays fixed.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from sparsejax.masks import flatten, map_with_name
from sparsejax.patterns import NM, parse
from sparsejax.scores import magnitude
from sparsejax.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slorb:
    """A parameterization (`sparsejax.parameterizations`) with latent {"params": w, "branch": S by path}.

    The masks are those of the transform, on "params"; S is dense, and dense weights count as the model's.

    Attributes:
      block: consecutive inputs (axis -2) that share an entry of S, the paper's k.
      pattern: N:M pattern of the masks that S starts from, that of the transform.
      include, exclude: path patterns of the parameters with a branch, see `masks.sparsifiable`.
    """

    block: int = 16
    pattern: Any = "2:4"
    include: tuple[str, ...] = ("*kernel",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"the blocks of SLoRB hold at least one input, got block={self.block}")
        if type(parse(self.pattern)) is not NM:
            raise ValueError(f"SLoRB needs an N:M pattern such as 2:4, got {self.pattern!r}")

    def init(self, key, params):
        """S as the block means of the weights that magnitude pruning removes; the key is not used.

        Raises:
          ValueError: if `block` does not divide the contracted axis of a leaf, naming it.
        """
        del key
        aim = Target(pattern=self.pattern, include=self.include, exclude=self.exclude)
        weights, masks = flatten(params), flatten(aim.masks(magnitude(params)))
        branch = {}
        for name in aim.patterns(params):
            weight, shape = weights[name], tuple(weights[name].shape)
            if shape[-2] % self.block:
                raise ValueError(
                    f"SLoRB in blocks of {self.block} needs axis -2 of {name} to be divisible by {self.block}, "
                    f"but its shape is {shape}"
                )
            pruned = jnp.where(masks[name], jnp.zeros_like(weight), weight)
            blocks = pruned.reshape(*shape[:-2], shape[-2] // self.block, self.block, shape[-1])
            branch[*name.split("/"), "blocks"] = jnp.mean(blocks, axis=-2)
        return {"params": params, "branch": unflatten_dict(branch)}, {}

    def materialize(self, latent, state, key=None):
        """w + P S, no penalty; deterministic with and without a key."""
        branch = {name.removesuffix("/blocks"): blocks for name, blocks in flatten(latent["branch"]).items()}

        def boosted(name, weight):
            return weight + jnp.repeat(branch[name], self.block, axis=-2) if name in branch else weight

        return map_with_name(boosted, latent["params"]), state, 0.0

    def masks(self, latent, state):
        """None: the transform's masks on `w` say which products are left out."""
