"""Codebooks against brute force over assignments and scikit-learn's k-means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from sparsejax.compress.codebook import Codebook, dense, insert, kmeans, nearest

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(12, 6)), jnp.float32)


def vectors_of(kernel, output, dim):
    return np.asarray(kernel)[:, output].reshape(-1, dim)


@pytest.mark.parametrize(("dim", "books"), [(1, 1), (1, 6), (2, 3), (3, 1)])
def test_nearest_is_nearest_and_dense_looks_it_up(dim, books):
    values = jnp.asarray(RNG.normal(size=(books, 4, dim)), jnp.float32)
    codes = nearest(values, KERNEL)
    assert codes.shape == (12 // dim, 6)
    kernel = np.asarray(dense(Codebook(values, codes)))
    for output in range(6):
        own = np.asarray(values)[output // (6 // books)]
        vectors = vectors_of(KERNEL, output, dim)
        closest = np.argmin(((vectors[:, None] - own) ** 2).sum(-1), axis=1)
        np.testing.assert_array_equal(codes[:, output], closest)
        np.testing.assert_array_equal(vectors_of(kernel, output, dim), own[closest])


def test_kmeans_of_one_book_is_scikit_learns():
    book = kmeans(KERNEL, codewords=5, iterations=100)
    start = np.sort(np.asarray(KERNEL).ravel())[np.floor((np.arange(5) + 0.5) / 5 * 72).astype(int)]
    expected = KMeans(5, init=start[:, None], n_init=1, max_iter=100, tol=0).fit(
        np.asarray(KERNEL).reshape(-1, 1)
    )
    np.testing.assert_allclose(
        np.sort(book.values[0, :, 0]), np.sort(expected.cluster_centers_[:, 0]), atol=1e-5
    )


def test_vectors_and_masks():
    exact = kmeans(KERNEL, codewords=36, dim=2)  # as many codewords as vectors
    np.testing.assert_allclose(dense(exact), KERNEL, atol=1e-6)
    mask = jnp.asarray(RNG.random((12, 6)) > 0.5)
    book = kmeans(KERNEL, mask, codewords=3, books=2, iterations=100)
    for group in range(2):
        inside = np.asarray(mask)[:, 3 * group : 3 * group + 3]
        weights = np.asarray(KERNEL)[:, 3 * group : 3 * group + 3][inside]
        codes = np.asarray(book.codes)[:, 3 * group : 3 * group + 3][inside]
        means = [weights[codes == k].mean() for k in range(3)]  # Lloyd's fixed point, of the kept weights
        np.testing.assert_allclose(book.values[group, :, 0], means, atol=1e-5)


def test_gradients_of_values_are_sums_over_members_and_insert_keeps_dtypes():
    book = kmeans(KERNEL, codewords=4, dim=2, books=2)
    g = jnp.asarray(RNG.normal(size=(12, 6)), jnp.float32)
    found = jax.grad(lambda values: jnp.sum(g * dense(book._replace(values=values))))(book.values)
    expected = np.zeros((2, 4, 2))
    for output in range(6):
        for vector, code in zip(vectors_of(g, output, 2), np.asarray(book.codes)[:, output], strict=True):
            expected[output // 3, code] += vector
    np.testing.assert_allclose(found, expected, atol=1e-5)
    tree = {"a": {"kernel": KERNEL.astype(jnp.bfloat16), "bias": jnp.ones(6)}}
    new = insert(tree, {"a/kernel": book})
    assert new["a"]["kernel"].dtype == jnp.bfloat16 and new["a"]["bias"] is tree["a"]["bias"]
    np.testing.assert_array_equal(new["a"]["kernel"], dense(book).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codewords": 4, "dim": 5}, "dim=5 to divide the inputs and books=1 the outputs"),
        ({"codewords": 100}, "100 codewords are more than the 72 vectors of a book"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        kmeans(KERNEL, **settings)
    with pytest.raises(ValueError, match="cannot leave out single weights"):
        kmeans(KERNEL, KERNEL > 0, codewords=2, dim=2)
    with pytest.raises(ValueError, match=r"the kernel has shape \(2, 12, 6\)"):
        kmeans(jnp.zeros((2, 12, 6)), codewords=2)


def test_empty_books_and_fewer_kept_weights_than_codewords():
    mask = np.zeros((12, 6), bool)
    mask[:2, 3] = True  # the first book is empty, the second has two weights for four codewords
    book = kmeans(KERNEL, jnp.asarray(mask), codewords=4, books=2)
    assert np.all(np.isfinite(book.values))
    np.testing.assert_allclose(np.asarray(dense(book))[mask], np.asarray(KERNEL)[mask], atol=1e-6)
