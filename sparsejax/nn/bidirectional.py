"""Layers whose backward pass multiplies by other weights than their forward pass (BDWP, Fang et al. 2023).

A layer is linear in its weights and in its input, Y = X W; a training step has three products:

    Y  = X W_ff             forward
    dX = dY W_bp^T          gradient of the input
    dW = X^T dY             gradient of the weights, which no weights enter

W_ff is the kernel under the collection `masks`, W_bp the same kernel under `backward_masks`. dW passes
straight through to all of W. For convolutions the products are those of the convolution.

A leaf of `backward_masks` is a mask like those of `masks` (the scalar True: all of W), or a bool array of one
axis of length M with N entries True, which stands for SDGP (McDanel et al. 2022): W_bp = W, and of every M
consecutive features of dY only the N largest enter dX.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta

from sparsejax.masks import is_sparsified, mask_weight
from sparsejax.selection import top_k_mask


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def bidirectional(product, forward, backward, template, x):
    """`product(forward, x)`, whose gradient with respect to `x` is that of `product(backward, x)`.

    Args:
      product: function of (weights, x), affine in either: its derivatives by the one depend on the other only.
      forward: tree of weights for the value; it receives their full gradient.
      backward: tree like `forward`, for the gradient of x; it receives none.
      template: None, or a bool array (M,): only as many of every M features of the output's gradient as it
        has entries True enter the gradient of x.
      x: the input.
    """
    del backward, template
    return product(forward, x)


def _forward(product, forward, backward, template, x):
    return product(forward, x), (backward, template, x)


def _backward(product, residuals, output_grad):
    backward, template, x = residuals
    _, transpose = jax.vjp(product, backward, x)
    pruned = output_grad if template is None else prune_features(output_grad, template)
    # of each call XLA computes only the half that is used
    weights_grad, input_grad = transpose(output_grad)[0], transpose(pruned)[1]
    return weights_grad, jax.tree.map(jnp.zeros_like, backward), None, input_grad


bidirectional.defvjp(_forward, _backward)


def prune_features(values, template):
    """Zeros all but the N entries of largest magnitude of every M along the last axis.

    Args:
      values: array whose last axis M divides.
      template: bool array of shape (M,) with N entries True.
    """
    groups = values.reshape(*values.shape[:-1], -1, template.size)
    kept = top_k_mask(jnp.abs(groups), jnp.sum(template), axis=-1)
    return jnp.where(kept, groups, 0).reshape(values.shape)


class Bidirectional(linen.Module):
    """Mixin for a linear layer with a `kernel`: reads `backward_masks` beside `masks`."""

    @linen.nowrap  # the layer's own __call__ is the one that flax registers and that interceptors see (without backward masks)
    def __call__(self, inputs):
        """The layer; see the module's docstring for its gradient if it has backward masks."""
        if not self.has_variable("backward_masks", "kernel"):
            return super().__call__(inputs)
        params, masks = ({**meta.unbox(self.variables.get(name, {}))} for name in ("params", "masks"))
        kernel, mask = params["kernel"], self.get_variable("backward_masks", "kernel")
        is_template = is_sparsified(mask) and jnp.ndim(mask) != jnp.ndim(kernel)
        forward = {name: mask_weight(leaf, masks.get(name, True)) for name, leaf in params.items()}
        backward = {**forward, "kernel": kernel if is_template else mask_weight(kernel, mask)}
        stock = self.clone(parent=None, name=None)  # unbound, it sees the parameters it is given and no masks
        product = partial(_apply, stock)
        return bidirectional(product, forward, backward, mask if is_template else None, inputs)


def _apply(layer, params, x):
    return layer.apply({"params": params}, x)
