"""TopKLD: distillation that balances a teacher's top classes against its whole distribution.

Ding et al. 2025, "Dissecting bit-level scaling laws in quantizing vision generative models". From the paper: the
name, that it distils a quantised model from its full-precision self, and the aim to balance *explicit knowledge*
(which of its likeliest tokens the teacher would choose) and *implicit knowledge* (all that its other
probabilities tell). Ours, since the equation was not to be had in the open: with p and q the softmaxes of teacher
and student at temperature T, K the k classes that the teacher finds likeliest, and p_K, q_K both restricted to K
and normalised there,

  loss = T^2 [ balance KL(p_K || q_K) + (1 - balance) KL(p || q) ].

balance 0, or k = all classes, is plain distillation (Hinton et al. 2015). KL(p || q) weighs what happens among K
by the teacher's mass of K; the first term does not, so that the order of the top classes counts as much where the
teacher is unsure. Like plain distillation the loss is 0 only for q = p, unless balance is 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def topkld(*, k: int = 10, balance: float = 0.5, temperature: float = 1.0) -> Callable:
    """The loss `f(teacher_logits, student_logits)`, which is no target of gradients with respect to the teacher.

    Both logits are `(..., classes)`; the loss is float32 `(...)`, in nats. Classes whose teacher logit is -inf do not
    count; a student that excludes one which the teacher does not has an infinite loss.

    Args:
      k: how many of the teacher's classes are explicit; ties go to the lowest class.
      balance: share of the explicit part, in [0, 1].
      temperature: of both softmaxes, above 0.

    Raises:
      ValueError: for an argument out of range, or (when it is called) if k exceeds the classes, or the shapes differ.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k of topkld must be an integer of at least 1, got {k!r}")
    if not 0 <= balance <= 1:
        raise ValueError(f"balance of topkld must be in [0, 1], got {balance!r}")
    if not temperature > 0:
        raise ValueError(f"temperature of topkld must be above 0, got {temperature!r}")

    def loss(teacher_logits, student_logits):
        if jnp.shape(teacher_logits) != jnp.shape(student_logits):
            raise ValueError(
                f"logits of teacher and student must have one shape, got {jnp.shape(teacher_logits)} and "
                f"{jnp.shape(student_logits)}"
            )
        if k > jnp.shape(teacher_logits)[-1]:
            raise ValueError(
                f"k={k} of topkld exceeds the {jnp.shape(teacher_logits)[-1]} classes of the logits"
            )
        teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits, jnp.float32)) / temperature
        student = jnp.asarray(student_logits, jnp.float32) / temperature
        top, classes = jax.lax.top_k(teacher, k)
        explicit = _divergence(top, jnp.take_along_axis(student, classes, axis=-1))
        return temperature**2 * (balance * explicit + (1 - balance) * _divergence(teacher, student))

    return loss


def _divergence(teacher, student):
    """KL between the softmaxes of logits over the last axis; classes of teacher logit -inf do not count."""
    return divergence(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student))


def divergence(log_p, log_q):
    """sum of p (log p - log q) over the last axis, where outcomes with p = 0 give 0, also to gradients."""
    possible = log_p > -jnp.inf
    log_p, log_q = (jnp.where(possible, x, 0.0) for x in (log_p, log_q))
    return jnp.sum(jnp.where(possible, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
