"""Dense and Conv with backward masks: each of the three products against autodiff of stock layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from sparsejax import flops, nn
from sparsejax.nn.bidirectional import prune_features

RNG = np.random.default_rng(0)
LAYERS = {
    "dense": (nn.Dense(8), linen.Dense(8), (5, 12)),
    "dense on sequences": (nn.Dense(8), linen.Dense(8), (2, 3, 12)),
    "dense without bias": (nn.Dense(8, use_bias=False), linen.Dense(8, use_bias=False), (5, 12)),
    "conv": (nn.Conv(8, (3, 3), 2, "SAME"), linen.Conv(8, (3, 3), 2, "SAME"), (2, 7, 7, 4)),
    "circular conv": (
        nn.Conv(8, (3,), padding="CIRCULAR"), linen.Conv(8, (3,), padding="CIRCULAR"), (2, 9, 4),
    ),
    "grouped conv": (
        nn.Conv(8, (3, 3), feature_group_count=2), linen.Conv(8, (3, 3), feature_group_count=2), (2, 5, 5, 4),
    ),
}  # fmt: skip


def setup(name):
    """Ours, stock, input, parameters, forward and backward masks of the kernel, gradient of the output."""
    ours, stock, shape = LAYERS[name]
    x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    params = stock.init(jax.random.key(0), x)["params"]
    forward, backward = (jnp.asarray(RNG.random(params["kernel"].shape) < 0.5) for _ in range(2))
    out_grad = jnp.asarray(
        RNG.normal(size=jax.eval_shape(stock.apply, {"params": params}, x).shape), jnp.float32
    )
    return ours, stock, x, params, forward, backward, out_grad


def tree(params, kernel):
    """Masks for the kernel, scalars for the bias."""
    return {name: kernel if name == "kernel" else jnp.asarray(True) for name in params}


def ours_vjp(layer, params, x, forward, backward, out_grad):
    masks = {"masks": tree(params, forward), "backward_masks": tree(params, backward)}

    @jax.jit
    def run(params, x):
        value, transpose = jax.vjp(lambda params, x: layer.apply({"params": params, **masks}, x), params, x)
        return value, *transpose(out_grad)

    return run(params, x)


def stock_vjp(layer, params, x, mask, out_grad):
    """Value, gradient of the (masked) parameters and of the input."""
    masked = {**params, "kernel": params["kernel"] * mask}
    value, transpose = jax.vjp(lambda params, x: layer.apply({"params": params}, x), masked, x)
    return value, *transpose(out_grad)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_the_three_products(name):
    """Y and dW are those of the forward weights, dX is that of the backward ones, dW reaches all of W."""
    ours, stock, x, params, forward, backward, out_grad = setup(name)
    value, weight_grad, input_grad = ours_vjp(ours, params, x, forward, backward, out_grad)
    expected, expected_weight_grad, wrong = stock_vjp(stock, params, x, forward, out_grad)
    _, same_weight_grad, expected_input_grad = stock_vjp(stock, params, x, backward, out_grad)
    close(value, expected)
    close(weight_grad, expected_weight_grad)
    close(weight_grad, same_weight_grad)
    close(input_grad, expected_input_grad)
    assert np.abs(input_grad - wrong).max() > 0.1
    assert (np.asarray(weight_grad["kernel"])[~np.asarray(forward)] != 0).any()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["equal masks", "full masks", "scalars"])
def test_without_a_second_mask_it_is_the_straight_through_estimator(name, kind):
    ours, stock, x, params, forward, _, out_grad = setup(name)
    mask = {"equal masks": forward, "full masks": jnp.ones_like(forward), "scalars": jnp.asarray(True)}[kind]
    close(ours_vjp(ours, params, x, mask, mask, out_grad), stock_vjp(stock, params, x, mask, out_grad))


@pytest.mark.parametrize("name", LAYERS)
def test_a_template_prunes_the_gradient_of_the_output(name):
    """SDGP: dX of the pruned dY with dense weights, dW of the full dY."""
    ours, stock, x, params, forward, _, out_grad = setup(name)
    template = jnp.arange(4) < 2
    _, weight_grad, input_grad = ours_vjp(ours, params, x, forward, template, out_grad)
    _, _, expected = stock_vjp(stock, params, x, jnp.ones_like(forward), prune_features(out_grad, template))
    _, expected_weight_grad, wrong = stock_vjp(stock, params, x, jnp.ones_like(forward), out_grad)
    close(input_grad, expected)
    close(weight_grad, expected_weight_grad)
    assert np.abs(input_grad - wrong).max() > 0.1


def test_prune_features_by_hand():
    values = jnp.asarray([[1.0, -3.0, 2.0, 0.5, 0.0, 4.0, -4.0, 5.0]])
    kept = prune_features(values, jnp.asarray([True, True, False, False]))
    np.testing.assert_array_equal(kept, [[0.0, -3.0, 2.0, 0.0, 0.0, 4.0, 0.0, 5.0]])
    np.testing.assert_array_equal(prune_features(values, jnp.ones(4, bool)), values)


def test_half_precision_computes_in_the_layers_dtype():
    layer = nn.Dense(8, dtype=jnp.bfloat16)
    x = jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    forward = jnp.asarray(RNG.random((8, 8)) < 0.5)
    value, grads, input_grad = ours_vjp(layer, params, x, forward, ~forward, jnp.ones((4, 8), jnp.bfloat16))
    assert value.dtype == jnp.bfloat16 and grads["kernel"].dtype == input_grad.dtype == jnp.float32


def test_in_a_model_the_error_that_flows_back_is_that_of_the_backward_weights():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return nn.Dense(1, name="head")(jnp.tanh(nn.Dense(4, name="hidden")(x)))

    model, x = Net(), jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    masks = jax.tree.map(lambda leaf: jnp.asarray(RNG.random(leaf.shape) < 0.7), params)
    backward = jax.tree.map(lambda leaf: jnp.asarray(RNG.random(leaf.shape) < 0.7), params)
    variables = {"masks": masks, "backward_masks": backward}
    grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p, **variables}, x)))(params)
    hidden, head = params["hidden"], params["head"]
    z = np.tanh(x @ (hidden["kernel"] * masks["hidden"]["kernel"]) + hidden["bias"] * masks["hidden"]["bias"])
    error = np.ones((6, 1)) @ (head["kernel"] * backward["head"]["kernel"]).T * (1 - z**2)
    np.testing.assert_allclose(grads["hidden"]["kernel"], x.T @ error, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["head"]["kernel"], z.T @ np.ones((6, 1)), rtol=1e-4, atol=1e-5)


def test_multiply_adds_are_counted_once():
    x = jnp.ones((2, 12))
    variables = nn.Dense(8).init(jax.random.key(0), x)
    assert flops.layer_macs(nn.Dense(8), variables, x) == {"kernel": 96}


def test_a_layer_that_cannot_use_a_backward_mask_says_so():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return nn.DenseGeneral((2, 4), name="query")(x)

    x = jnp.ones((2, 12))
    params = Net().init(jax.random.key(0), x)["params"]
    backward = {"query": tree(params["query"], jnp.ones((12, 2, 4), bool))}
    with pytest.raises(ValueError, match="query/kernel has a backward mask.*not DenseGeneral"):
        Net().apply({"params": params, "backward_masks": backward}, x)
