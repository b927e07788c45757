"""TopKLD against its definition in numpy, and its limits: plain distillation, and one class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.topkld import topkld

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(size=(2, 5, 7)), RNG.normal(size=(2, 5, 7))


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def kl(p, q):
    return float(np.sum(p * np.log(p / q)))


def expected(teacher, student, k, balance, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    top = np.argsort(-p, kind="stable")[:k]
    explicit = kl(p[top] / p[top].sum(), q[top] / q[top].sum())
    return temperature**2 * (balance * explicit + (1 - balance) * kl(p, q))


@pytest.mark.parametrize(("k", "balance", "temperature"), [(3, 0.5, 1.0), (2, 0.9, 2.0), (7, 0.3, 0.5)])
def test_equals_the_definition(k, balance, temperature):
    found = topkld(k=k, balance=balance, temperature=temperature)(TEACHER, STUDENT)
    assert found.shape == (2, 5) and found.dtype == jnp.float32
    for i in np.ndindex(2, 5):
        np.testing.assert_allclose(
            found[i], expected(TEACHER[i], STUDENT[i], k, balance, temperature), rtol=1e-4
        )


def test_limits():
    plain = topkld(k=3, balance=0.0)(TEACHER, STUDENT)
    np.testing.assert_allclose(topkld(k=7, balance=0.8)(TEACHER, STUDENT), plain, rtol=1e-5)
    np.testing.assert_allclose(topkld(k=1, balance=1.0)(TEACHER, STUDENT), 0, atol=1e-6)
    np.testing.assert_allclose(topkld(k=3)(TEACHER, TEACHER + 2.0), 0, atol=1e-6)


def test_classes_that_the_teacher_excludes_do_not_count():
    masked = np.concatenate([TEACHER, np.full((2, 5, 2), -np.inf)], -1)
    for student in (
        np.concatenate([STUDENT, np.full((2, 5, 2), -np.inf)], -1),
        np.pad(STUDENT, [(0, 0)] * 2 + [(0, 2)]),
    ):
        for k in (3, 9):
            loss, gradient = jax.value_and_grad(lambda x, k=k: topkld(k=k)(masked, x).sum())(
                jnp.asarray(student)
            )  # noqa: B023
            assert np.isfinite(loss) and np.all(np.isfinite(gradient))
    excluded = np.concatenate([STUDENT, np.full((2, 5, 2), -np.inf)], -1)
    np.testing.assert_allclose(topkld(k=3)(masked, excluded), topkld(k=3)(TEACHER, STUDENT), rtol=1e-5)


def test_descent_brings_the_student_to_the_teacher_and_leaves_the_teacher_alone():
    loss = topkld(k=2)

    def total(teacher, student):
        return loss(teacher, student).sum()

    teacher, student = map(jnp.asarray, (TEACHER, STUDENT))
    assert not np.any(jax.grad(total)(teacher, student))
    step = jax.jit(lambda student: student - 2 * jax.grad(total, 1)(teacher, student))
    for _ in range(300):
        student = step(student)
    np.testing.assert_allclose(jax.nn.softmax(student), jax.nn.softmax(teacher), atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k of topkld must be an integer of at least 1, got 0"),
        ({"balance": 1.5}, r"balance of topkld must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature of topkld must be above 0, got 0.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        topkld(**settings)


def test_bad_logits():
    with pytest.raises(ValueError, match="k=8 of topkld exceeds the 7 classes of the logits"):
        topkld(k=8)(TEACHER, STUDENT)
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 5, 7\) and \(5, 7\)"):
        topkld()(TEACHER, STUDENT[0])
