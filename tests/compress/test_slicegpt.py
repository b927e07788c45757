"""SliceGPT: nothing changes at the whole width, and what is lost at a smaller one is what PCA says."""

import jax
import numpy as np
import pytest

from sparsejax.compress.norms import fold_norms
from sparsejax.compress.shrink import linear_weights
from sparsejax.compress.slicegpt import _weights, slice_model, slicegpt
from sparsejax.models import Transformer

TOKENS = np.random.default_rng(9).integers(0, 31, (5, 12))
GPT = dict(classes=31, depth=2, width=16, heads=4, max_length=16, tied=True)
LLAMA = dict(
    classes=31,
    depth=2,
    width=16,
    heads=4,
    max_length=16,
    norm="rms",
    positions="rotary",
    activation="silu",
    gated=True,
    bias=(),
    kv_heads=2,
    hidden=24,
)


def noisy(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.4).astype(np.float32), shapes)


def logits(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS)


@pytest.mark.parametrize(
    "keywords",
    [GPT, LLAMA, pytest.param(GPT | {"bias": ("key", "down"), "tied": False}, marks=pytest.mark.slow)],
)
def test_folded_norms_and_the_whole_width_change_nothing(keywords):
    model = Transformer(**keywords)
    params = noisy(model)
    expected = logits(model, params)
    folded, parts = fold_norms(model, params)
    assert folded.norm == "rms" and (parts["block_1"]["norm_1"]["scale"] == 1).all()
    np.testing.assert_allclose(logits(folded, parts), expected, rtol=2e-5, atol=2e-5)
    same, rotated, sites = slice_model(model, params, TOKENS, 16)
    np.testing.assert_allclose(logits(same, rotated), expected, rtol=1e-4, atol=1e-4)
    assert max(site["lost"] for site in sites.values()) < 1e-12
    assert rotated["block_0"]["shortcut_0"].shape == (16, 16)


def low_rank(model, rank):
    """Parameters whose residual stream stays in a subspace."""
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.normal(size=(model.width, rank)))[0]
    params = noisy(model)
    params["embed"]["embedding"] = params["embed"]["embedding"] @ basis @ basis.T
    for part in (params["block_0"], params["block_1"]):
        for sub, name in (("attention", "out"), ("mlp", "down")):
            part[sub][name]["kernel"] = part[sub][name]["kernel"] @ basis @ basis.T
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), params)


def test_a_stream_in_a_subspace_is_sliced_without_loss():
    model = Transformer(**LLAMA)
    params = low_rank(model, 8)
    for last in (True, False):
        small, less, sites = slice_model(model, params, TOKENS, 8, slice_last=last)
        np.testing.assert_allclose(logits(small, less), logits(model, params), rtol=2e-4, atol=2e-4)
        assert max(site["lost"] for site in sites.values()) < 1e-10
        assert len(sites) == 2 * model.depth + last
        assert less["head"]["kernel"].shape[0] == (8 if last else 16)
    assert less["embed"]["embedding"].shape == (31, 8) and small.norm_width == 16


def test_what_is_lost_is_the_sum_of_the_trailing_eigenvalues():
    model = Transformer(**LLAMA)
    params = noisy(model)
    _, _, sites = slice_model(model, params, TOKENS, 10)
    states = params["embed"]["embedding"][TOKENS].reshape(-1, 16).astype(np.float64)
    values = np.linalg.svd(states, compute_uv=False) ** 2
    assert sites["block_0/norm_0"]["lost"] == pytest.approx(values[10:].sum() / values.sum(), rel=1e-6)


@pytest.mark.slow
def test_each_pca_sees_what_was_sliced_before():
    model = Transformer(**LLAMA | {"depth": 1})
    params = noisy(model)
    small, less, sites = slice_model(model, params, TOKENS, 8, orientation="pca", slice_last=True)
    # the states before norm_1, by hand: sliced embeddings back in all channels, and attention on them
    states = params["embed"]["embedding"][TOKENS].astype(np.float64)
    vectors = np.linalg.eigh(np.einsum("btd,bte->de", states, states))[1][:, ::-1][:, :8]
    sliced = (states @ vectors @ vectors.T).astype(np.float32)
    block = model.block(0).clone(hidden_width=0, parent=None)
    part = {name: params["block_0"][name] for name in ("norm_0", "attention")}
    middle = np.asarray(jax.jit(block.apply)({"params": part}, sliced, **model.context(12)), np.float64)
    values = np.linalg.eigvalsh(np.einsum("btd,bte->de", middle, middle))[::-1]
    assert sites["block_0/norm_1"]["lost"] == pytest.approx(values[8:].sum() / values.sum(), rel=1e-3)
    assert less["block_0"]["shortcut_0"].shape == (8, 8) and small.layers[0]["stream"] == (8, 8, 8)


@pytest.mark.slow
def test_orientations_agree_and_pca_loses_less_than_the_others():
    model = Transformer(**GPT)
    params = noisy(model)
    runs = {
        key: slice_model(model, params, TOKENS, 12, basis=key[0], orientation=key[1])
        for key in (("pca", "random"), ("pca", "pca"), ("random", "pca"), ("variance", "pca"))
    }
    turned, plain = (logits(*runs["pca", kind][:2]) for kind in ("random", "pca"))
    np.testing.assert_allclose(turned, plain, rtol=1e-3, atol=1e-3)
    lost = {key: run[2]["block_0/norm_0"]["lost"] for key, run in runs.items()}
    assert lost["pca", "pca"] < min(lost["random", "pca"], lost["variance", "pca"])
    assert lost["pca", "pca"] == pytest.approx(lost["pca", "random"])


def test_the_method_counts_widths_or_weights():
    model = Transformer(**LLAMA)
    params = noisy(model)
    same = slicegpt().run(model, params, TOKENS, 0.0)
    assert same.model == model and same.report["sparsity"] == 0
    found = slicegpt(multiple=4).run(model, params, TOKENS, 0.3, progress=False)
    assert found.model.width == 8 and found.report["sparsity"] == 0.5 and found.masks is None
    kept = linear_weights(found.params, 2)
    assert found.report["kept"] == kept == _weights(model, 8, False)
    assert found.report["weight_sparsity"] == 1 - kept / linear_weights(params, 2)
    by_weight = slicegpt(count="weights", multiple=2, slice_last=True).run(model, params, TOKENS, 0.3)
    assert by_weight.report["sparsity"] == by_weight.report["weight_sparsity"] >= 0.3
    wider = _weights(model, by_weight.model.width + 2, True)
    assert wider > 0.7 * linear_weights(params, 2)


def test_bad_input():
    model = Transformer(**LLAMA)
    with pytest.raises(ValueError, match="unknown basis 'pcA'"):
        slicegpt(basis="pcA")
    with pytest.raises(ValueError, match="slicegpt removes whole structures and takes no pattern, got '2:4'"):
        slicegpt().run(model, {}, TOKENS, 0.5, "2:4")
    with pytest.raises(ValueError, match=r"no multiple of 8 channels of 16 removes a share of 0.9 \(width\)"):
        slicegpt().run(model, noisy(model), TOKENS, 0.9)
    with pytest.raises(ValueError, match="the width of a sliced model must be in 1 to 16, got 17"):
        slice_model(model, {}, TOKENS, 17)
    sliced = model.clone(layers=({"stream": (16, 16, 16)}, {}))
    with pytest.raises(ValueError, match="the model is sliced already"):
        slice_model(sliced, {}, TOKENS, 8)
    experts = Transformer(**LLAMA | {"experts": 2, "norm": "layer"})
    with pytest.raises(ValueError, match="the LayerNorm before a router cannot be folded"):
        fold_norms(experts, {})
