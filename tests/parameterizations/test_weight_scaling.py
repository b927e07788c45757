"""Weight scaling against explicit sums, and folding against the network that it folds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import masks as masks_lib
from sparsejax.models import MLP
from sparsejax.parameterizations import Parameterized, build


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "dense": {"kernel": jax.random.normal(keys[0], (6, 5)), "bias": jnp.ones(5)},
        "conv": {"kernel": jax.random.normal(keys[1], (3, 3, 4, 2))},
    }


def random_scales(latent, seed=1):
    return latent | {
        "scales": masks_lib.map_with_name(
            lambda name, leaf: jax.random.normal(jax.random.key(seed), leaf.shape), latent["scales"]
        )
    }


def test_it_starts_as_the_weights_it_was_given():
    latent, state = build("weight_scaling").init(jax.random.key(0), params())
    made, state, penalty = build("weight_scaling").materialize(latent, state)
    jax.tree.map(np.testing.assert_array_equal, made, params())
    assert state == {} and penalty == 0.0
    assert masks_lib.flatten(latent["scales"]).keys() == {"dense/kernel/scale", "conv/kernel/scale"}
    assert not masks_lib.sparsifiable(latent).keys() & {"scales/dense/kernel/scale"}, (
        "scales are never pruned"
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_every_group_of_inputs_of_every_output_has_its_scale(groups):
    scaling = build("weight_scaling", groups=groups, include=["*kernel"])
    latent = random_scales(scaling.init(jax.random.key(0), params())[0])
    made = jax.tree.map(np.asarray, scaling.fold(latent))
    scale = np.asarray(latent["scales"]["dense"]["kernel"]["scale"])
    for i in range(6):
        for j in range(5):
            weight = latent["params"]["dense"]["kernel"][i, j] * scale[i // (6 // groups), j]
            np.testing.assert_allclose(made["dense"]["kernel"][i, j], weight, rtol=1e-6)
    scale = np.asarray(latent["scales"]["conv"]["kernel"]["scale"])
    for i in range(4):
        weight = latent["params"]["conv"]["kernel"][:, :, i] * scale[i // (4 // groups)]
        np.testing.assert_allclose(made["conv"]["kernel"][:, :, i], weight, rtol=1e-6)
    np.testing.assert_array_equal(made["dense"]["bias"], 1.0)


def test_gradient_of_a_scale_is_the_sum_over_its_group():
    scaling = build("weight_scaling", groups=2, exclude=("conv/*",))
    latent, _ = scaling.init(jax.random.key(0), params())
    out = jax.random.normal(jax.random.key(3), (6, 5))
    grads = jax.grad(lambda latent: jnp.sum(out * scaling.fold(latent)["dense"]["kernel"]))(
        random_scales(latent)
    )
    products = np.asarray(out * latent["params"]["dense"]["kernel"]).reshape(2, 3, 5)
    np.testing.assert_allclose(grads["scales"]["dense"]["kernel"]["scale"], products.sum(1), rtol=1e-5)


def test_folding_changes_no_output_and_moves_no_zero():
    model = Parameterized(MLP(classes=3, hidden=(8, 4)), build("weight_scaling"))
    x = jax.random.normal(jax.random.key(2), (5, 8))
    variables = model.init(jax.random.key(0), x)
    latent = random_scales(variables["params"])
    kernel = latent["params"]["dense_0"]["kernel"]
    latent["params"]["dense_0"]["kernel"] = jnp.where(jnp.arange(8)[:, None] % 4 < 2, kernel, 0.0)
    folded = model.parameterization.fold(latent)
    plain = model.model.apply({"params": folded}, x)
    np.testing.assert_allclose(model.apply({"params": latent}, x), plain, rtol=1e-6, atol=1e-6)
    trained, _ = model.apply(
        {"params": latent}, x, train=True, mutable=["losses"], rngs={"sample": jax.random.key(1)}
    )
    np.testing.assert_allclose(trained, plain, rtol=1e-6, atol=1e-6)
    zeros = np.asarray(folded["dense_0"]["kernel"]) == 0
    np.testing.assert_array_equal(zeros, np.broadcast_to(np.arange(8)[:, None] % 4 >= 2, zeros.shape))


def test_bad_input():
    with pytest.raises(ValueError, match="weight scaling needs at least one group, got groups=0"):
        build("weight_scaling", groups=0)
    message = "in 5 groups needs axis -2 of conv/kernel to be divisible by 5, but its shape is"
    with pytest.raises(ValueError, match=message):
        build("weight_scaling", groups=5).init(jax.random.key(0), params())
