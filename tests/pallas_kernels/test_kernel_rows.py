"""Opaque kernels under `jax.vmap`, with a matrix product in the place of one; on meshes see `test_kernel_dispatch`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rows import call


@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, None)])
def test_what_is_mapped(name, axes):
    rng = np.random.default_rng(0)
    shapes = [(3, 2, 4), (3, 4, 5)]
    arrays = [rng.normal(size=s if axis is not None else s[1:]) for s, axis in zip(shapes, axes, strict=True)]
    arrays = [jnp.asarray(array, jnp.float32) for array in arrays]
    if axes[0] == 1:
        arrays[0] = arrays[0].swapaxes(0, 1)
    product = lambda a, b: call(name, jnp.matmul, "mk kn -> mn", a, b)  # noqa: E731
    expected = jax.vmap(jnp.matmul, axes)(*arrays)
    np.testing.assert_allclose(jax.vmap(product, axes)(*arrays), expected, rtol=1e-5, atol=1e-5)


def test_a_mapped_axis_of_rows_is_merged():
    seen = []

    def product(a, b):
        seen.append(a.shape)
        return a @ b

    function = jax.vmap(lambda a, b: call("pallas_gpu", product, "mk kn -> mn", a, b), (0, None))
    twice = jax.vmap(function, (0, None))(jnp.ones((5, 3, 2, 4)), jnp.ones((4, 6)))
    assert twice.shape == (5, 3, 2, 6) and seen[-1] == (30, 4)


def test_positions_are_mapped():
    a, b, at = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 2)), jnp.asarray([[0, 1], [1, 1], [0, 0]])
    sampled = lambda a, b, at: call("pallas_tpu", lambda a, b, at: (a @ b)[at, 0], "ik kj m -> m", a, b, at)  # noqa: E731
    np.testing.assert_array_equal(jax.vmap(sampled, (None, None, 0))(a, b, at), (a @ b)[at, 0])
