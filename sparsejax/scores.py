"""Scores: how important each weight is. Larger is kept.

Every function returns a tree like the parameters, computed in float32 (bfloat16 magnitudes would tie). A
score knows nothing of masks, patterns or budgets; score masked parameters to score a sparse network.

  magnitude  |w|
  random     uniform in [0, 1)
  gradient   |g|
  taylor     |w g|        first-order change of the loss when the weight is removed (Molchanov et al. 2017)
  movement   -w g         accumulated over steps by the caller (Sanh et al. 2020)
  snip       |w g|        at initialisation (Lee et al. 2019)
  grasp      w (Hg)       at initialisation (Wang et al. 2020)
  synflow    |w dR/dw|    at initialisation, without data (Tanaka et al. 2020)
"""

import zlib

import jax
import jax.numpy as jnp

from sparsejax import masks


def magnitude(params):
    """|w|."""
    return jax.tree.map(lambda weight: jnp.abs(_float32(weight)), params)


def random(key, params):
    """Uniform scores in [0, 1).

    Each leaf draws from `key` folded with a CRC of its path, so its scores depend on its own name and shape
    only: not on the other leaves, the process, or how the arrays are sharded.

    Args:
      key: a JAX PRNG key.
      params: tree of arrays, or of anything with a `.shape`.
    """

    def draw(name, leaf):
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(leaf_key, leaf.shape, jnp.float32)

    return masks.map_with_name(draw, params)


def gradient(grads):
    """|g|."""
    return magnitude(grads)


def taylor(params, grads):
    """|w g|, the first-order change of the loss when a weight is removed."""
    return jax.tree.map(lambda weight, grad: jnp.abs(_float32(weight) * _float32(grad)), params, grads)


def movement(params, grads):
    """-w g: positive where a gradient step moves the weight away from zero (Sanh et al. 2020).

    The paper sums it over steps; that accumulation is the caller's.
    """
    return jax.tree.map(lambda weight, grad: -_float32(weight) * _float32(grad), params, grads)


def snip(params, loss):
    """Connection sensitivity |dL/dm| at m = 1, which is |w g| (SNIP, Lee et al. 2019).

    The paper divides by the sum over all weights, which does not change the ranking and is left out.

    Args:
      params: the parameters at initialisation.
      loss: params -> scalar, on at least one batch that contains every class.
    """
    return taylor(params, jax.grad(loss)(params))


def grasp(params, loss):
    """Gradient signal preservation w (Hg), signed (GraSP, Wang et al. 2020).

    Removing w_i changes g by about -w_i H_i, hence |g|^2 by about -2 w_i (Hg)_i. The weights with the most
    negative score are those whose removal increases the gradient flow most; they go first, and the largest
    scores are kept. (The paper writes the opposite sign and removes the largest.)

    The gradient and the Hessian are those of all of `params`.

    Args:
      params: the parameters at initialisation.
      loss: params -> scalar; the paper divides the logits by 200 in it, and sums over 10 samples per class.
    """
    slope = jax.grad(loss)
    _, hessian_gradient = jax.jvp(slope, (params,), (slope(params),))
    return jax.tree.map(lambda weight, grad: _float32(weight) * _float32(grad), params, hessian_gradient)


def synflow(params, forward, input_shape):
    """Synaptic flow |w dR/dw|, R the summed output at |params| for an input of ones (Tanaka et al. 2020).

    R multiplies over layers and would overflow float32 in deep or wide networks. Where it passes 2^60 (only
    there), the input is scaled by a and the output by b, powers of two of about R^(-1/2). All weights and
    activations being non-negative, a network of affine layers, ReLU and pooling without (or with zero)
    biases is linear in its input: R(a x) = a R(x) for any a > 0, so every dR/dw is multiplied by the same a b
    and the ranking is unchanged, also across skip connections, where rescaling layers would change it. This
    covers R up to about 1e74; beyond, scores are NaN. Where R falls below 1e-38, scores underflow to zero.

    Args:
      params: the parameters; biases and norm scales take their absolute values too.
      forward: (params, x) -> outputs, with norm layers in inference mode.
      input_shape: shape of the input of ones, with a batch axis of 1.
    """
    positive = magnitude(params)
    ones = jnp.ones(input_shape, jnp.float32)

    def flow(positive, scale):
        return jnp.sum(forward(positive, ones * scale).astype(jnp.float32) * scale)

    tiny = jnp.float32(2.0**-120)
    # the exponent of R, from an input so small that R itself cannot overflow
    exponent = jnp.log2(jnp.sum(forward(positive, ones * tiny).astype(jnp.float32))) + 120
    needed = ~(flow(positive, jnp.float32(1.0)) < 2.0**60)
    half = jnp.clip(jnp.floor(exponent / 2), 0, 120)
    scale = jnp.where(needed, jnp.ldexp(jnp.float32(1.0), -half.astype(jnp.int32)), 1.0)
    grads = jax.grad(flow)(positive, scale)
    return jax.tree.map(lambda weight, grad: jnp.abs(weight * _float32(grad)), positive, grads)


# The scores that a transform can evaluate at any step, with one signature (params, grads) -> tree. Movement
# is not among them: it has to be summed over steps.
SCORES = {
    "magnitude": lambda params, grads: magnitude(params),
    "gradient": lambda params, grads: gradient(grads),
    "taylor": taylor,
}


def _float32(array):
    return jnp.asarray(array).astype(jnp.float32)
