"""Products of sparse matrices in XLA: two gathers and one sum by target along the list of products.

The list costs 12 bytes for each product, and the time follows its length. With a plan that has no list, both factors
and the product are laid out in full.
"""

import jax.numpy as jnp

from pallas_kernels.spgemm import reference
from pallas_kernels.sums import sum_dtype


def product(x, y, places, lists, sizes):
    """The entries of X Y at the third of `places`, see `pallas_kernels.spgemm`."""
    left, right, target = lists
    if not all(array.size for array in (x, y, target)):
        return reference.product(x, y, places, lists, sizes)
    # Any of the three may be the one whose padding lies beyond the last entry: it adds nothing.
    terms = _take(x, left) * _take(y, right)
    sums = jnp.zeros(places[2][0].size, terms.dtype).at[target].add(terms, mode="drop")
    return sums.astype(x.dtype)


def _take(values, places):
    return jnp.asarray(values).at[places].get(mode="fill", fill_value=0).astype(sum_dtype(values.dtype))
