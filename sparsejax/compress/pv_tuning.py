"""PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression (Malinovskii et al. 2024).

Kernels take their weights from codebooks (`sparsejax.compress.codebook`); with P the assignment of vectors to
codewords and V the codewords, the loss phi is minimised over both in turns. Each update takes the gradient g of phi
with respect to the dense weights q(P, V) and makes

  P step   P fixed: V <- Adam(V, sum of g over the vectors of each codeword)
  V step   V fixed: in a small subspace S of the vectors, P <- the nearest codewords to the target w - eta g~

The target is w_t = b_t + u_t, where u_t is the step of Adam on dense weights, scaled to the norm `code_rate` |q|
(LAMB), and b_t = q + (1 - delta_decay) (w_{t-1} - q). With delta_decay 1 it starts from the quantised weights at
every step; with 0 it is the accumulator of straight-through estimation. S are the `fraction` of the vectors with
the largest |w - q|: they can reach another codeword, where a step for all vectors would be lost in rounding. They
are admitted in that order while |change of q| <= `trust` |q|, the first one that changes always.

`pv_optimizer` is that; `pv_tuning` is the method, from k-means to a tuned model.

The names are the paper's, in which the "P step" keeps the *partition*. Defaults are those of the released code,
whose beam search we take with a beam of 1. Departure: gradients of both steps are those before the update.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

from sparsejax import masks as masks_lib
from sparsejax.compress.base import Compressed, Whole, check_pattern
from sparsejax.compress.codebook import Codebook, check, dense, insert, kmeans, split
from sparsejax.compress.gqsa_stages import kernels_of, with_kernels
from sparsejax.compress.objectives import check_distil, objective
from sparsejax.compress.stream import Stream
from sparsejax.patterns import Unstructured

# --- the method --------------------------------------------------------------------------------------


def pv_tuning(
    *,
    codewords: int = 16,
    dim: int = 1,
    books: int = 1,
    iterations: int = 25,
    epochs: int = 1,
    distil: Mapping | None = None,
    code_rate: float = 3e-3,
    value_rate: float = 3e-4,
    fraction: float = 0.01,
    trust: float | None = 0.01,
    delta_decay: float = 1.0,
    lamb: bool = True,
    batch: int = 8,
    seed: int = 0,
) -> Whole:
    """Codebooks of the linear kernels of the blocks by k-means, then tuned together.

    Args:
      codewords, dim, books, iterations: of every kernel, as in `sparsejax.compress.codebook.kmeans`.
      epochs: through the tokens, in a random order; the best state at the end of one stays, the start included.
      distil: None: trained on the next token; keywords of `sparsejax.compress.topkld`: on the dense model's
        predictions, which are computed batch by batch when they are needed.
      code_rate, value_rate, fraction, trust, delta_decay, lamb: as in `pv_optimizer`.
      batch: sequences of a batch.
      seed: of k-means and of the order of batches.

    Returns:
      A `Whole` that keeps every weight: sparsity 0 or None. Its report has "method", "sparsity", "bits" (of a code, per
      weight), "losses" (mean over batches, before the first epoch and after each), and "layers": of each its
      "sparsity", "density" and "error" as in `sparsejax.compress.prune_layers`, on inputs from the dense model.

    Raises:
      ValueError: for settings out of range; when it runs and before any work, for another sparsity or a pattern, for
        layers that have experts or that codebooks do not fit, and as `sparsejax.compress.topkld`.
    """
    if epochs < 0:
        raise ValueError(f"epochs of pv_tuning must be at least 0, got {epochs}")
    check_distil(distil)
    optimizer = pv_optimizer(
        code_rate=code_rate,
        value_rate=value_rate,
        fraction=fraction,
        trust=trust,
        delta_decay=delta_decay,
        lamb=lamb,
    )

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None) -> Compressed:
        check_pattern("pv_tuning", pattern or "unstructured", (Unstructured,))
        if sparsity:
            raise ValueError(f"pv_tuning keeps every weight, so its sparsity must be 0, got {sparsity}")
        stream = Stream(model, params, tokens, batch)
        for part, layers in stream.layers.items():
            for path, layer in layers.items():
                if len(layer.shape) != 2:
                    raise ValueError(f"pv_tuning cannot do experts, and {part}/{path} has {layer.shape[0]}")
                check(layer.shape, codewords, dim, books, f"{part}/{path}")
        params = {part: params[part] for part in model.parts()}
        loss, batches = objective(model, params, stream.tokens, batch, distil)
        kernels = kernels_of(
            params, [f"{part}/{path}" for part in stream.blocks for path in stream.layers[part]]
        )
        fit = dict(codewords=codewords, dim=dim, books=books, iterations=iterations, seed=seed)
        codebooks = {name: kmeans(jnp.asarray(kernel), **fit) for name, kernel in kernels.items()}
        codebooks, losses = _tune(optimizer, loss, params, codebooks, batches, epochs, seed, progress)
        new, layers = insert(params, codebooks), {}
        for part in stream.blocks:
            block = stream.block(part)
            for path, error in stream.errors(block, params[part], new[part], stream.layers[part]).items():
                layers[f"{part}/{path}"] = {"sparsity": 0.0, "density": 1.0, "error": error}
            stream.hidden = stream.run(block, params[part])
        report = {
            "method": "pv_tuning",
            "sparsity": 0.0,
            "bits": math.log2(codewords) / dim,
            "losses": losses,
        }
        return Compressed(model, new, masks_lib.dense_masks(new), {**report, "layers": layers})

    return Whole("pv_tuning", run)


def _tune(optimizer, loss, params, codebooks, batches: Sequence, epochs: int, seed: int, progress):
    """The codebooks of lowest loss at the end of an epoch or at the start, and the losses then."""

    @jax.jit
    def advance(codebooks, state, params, batch):
        kernels = {name: dense(book) for name, book in codebooks.items()}
        grads = jax.grad(lambda kernels: loss(with_kernels(params, kernels), batch))(kernels)
        return optimizer.update(grads, state, codebooks)

    def mean(codebooks):
        return float(np.mean([_value(loss, params, codebooks, batch) for batch in batches]))

    rng, state = np.random.default_rng(seed), optimizer.init(codebooks)
    best, losses = codebooks, [mean(codebooks)]
    for _ in tqdm(range(epochs), disable=None if progress is None else not progress, unit="epoch"):
        for i in rng.permutation(len(batches)):
            codebooks, state = advance(codebooks, state, params, batches[i])
        losses.append(mean(codebooks))
        if losses[-1] <= min(losses):
            best = codebooks
    return best, losses


@jax.jit(static_argnums=0)
def _value(loss, params, codebooks, batch):
    return loss(insert(params, codebooks), batch)


# --- the optimizer -----------------------------------------------------------------------------------


class PVOptimizer(NamedTuple):
    """The two functions of the optimiser.

    Attributes:
      init: `({path: Codebook}) -> PVState`.
      update: `({path: gradient (in, out) of the dense kernel}, PVState, {path: Codebook}) -> ({path: Codebook},
        PVState)`; jit-able.
    """

    init: Callable
    update: Callable


class PVState(NamedTuple):
    """values, codes: the states of both Adams; targets: {path: w, float32 (in, out)}."""

    values: Any
    codes: Any
    targets: Mapping[str, jnp.ndarray]


def pv_optimizer(
    *,
    code_rate: float | optax.Schedule = 3e-3,
    value_rate: float | optax.Schedule = 3e-4,
    code_betas: tuple[float, float] = (0.0, 0.95),
    value_betas: tuple[float, float] = (0.9, 0.95),
    fraction: float = 0.01,
    trust: float | None = 0.01,
    delta_decay: float = 1.0,
    lamb: bool = True,
) -> PVOptimizer:
    """The optimiser of codebooks, see the module.

    Args:
      code_rate, code_betas: of the target; with `lamb`, its step in norms of the kernel.
      value_rate, value_betas: of the codewords.
      fraction: of the vectors of a kernel in the subspace, in (0, 1]; at least one.
      trust: of the change of a kernel, in its norms; None for no limit.
      delta_decay: in [0, 1].
      lamb: whether steps of the target are scaled to the norm of the kernel.

    Raises:
      ValueError: for settings out of range.
    """
    _check_subspace(fraction, trust)
    if not 0 <= delta_decay <= 1:
        raise ValueError(f"delta_decay of pv_tuning must be in [0, 1], got {delta_decay!r}")
    value_steps = optax.adam(value_rate, *value_betas)
    code_steps = optax.chain(
        optax.scale_by_adam(*code_betas),
        optax.scale_by_trust_ratio() if lamb else optax.identity(),
        optax.scale_by_learning_rate(code_rate),
    )

    def init(codebooks):
        kernels = {name: dense(book) for name, book in codebooks.items()}
        values = {name: book.values for name, book in codebooks.items()}
        return PVState(value_steps.init(values), code_steps.init(kernels), kernels)

    def update(grads, state, codebooks):
        grads = {name: grads[name].astype(jnp.float32) for name in codebooks}
        old, pull = jax.vjp(
            lambda values: {name: dense(codebooks[name]._replace(values=v)) for name, v in values.items()},
            {name: book.values for name, book in codebooks.items()},
        )
        values = {name: book.values for name, book in codebooks.items()}
        steps, value_state = value_steps.update(pull(grads)[0], state.values, values)
        values = optax.apply_updates(values, steps)
        moves, code_state = code_steps.update(grads, state.codes, old)
        new, targets = {}, {}
        for name, book in codebooks.items():
            book = book._replace(values=values[name])
            start = dense(book)
            start += (1 - delta_decay) * (state.targets[name] - start)
            targets[name] = start + moves[name]
            new[name] = book._replace(codes=v_step(book, targets[name], fraction=fraction, trust=trust))
        return new, PVState(value_state, code_state, targets)

    return PVOptimizer(init, update)


def v_step(codebook: Codebook, target, *, fraction: float = 0.01, trust: float | None = 0.01):
    """The codes after one V step towards a target: int32, of the shape of the codebook's; jit-able.

    With the target w - (1 / L) g at a point w on the codebook, where L bounds the curvature of the loss, the loss
    does not rise, whatever the subspace.

    Args:
      codebook: whose values stay.
      target: float `(in, out)`.
      fraction, trust: as in `pv_optimizer`.
    """
    _check_subspace(fraction, trust)
    values, codes = codebook
    kernel, dim = dense(codebook), values.shape[-1]
    goals, now = (split(array, dim).reshape(-1, dim) for array in (target, kernel))
    size = max(1, math.ceil(fraction * len(goals)))
    _, chosen = lax.top_k(jnp.sum((goals - now) ** 2, axis=1), size)
    books = chosen % codes.shape[1] // (codes.shape[1] // len(values))

    def best(leaves):
        goal, book = leaves
        return jnp.argmin(jnp.sum((values[book] - goal) ** 2, axis=1)).astype(jnp.int32)

    found = lax.map(best, (goals[chosen], books), batch_size=min(size, 1024))
    if trust is not None:
        change = jnp.sum((values[books, found] - now[chosen]) ** 2, axis=1)
        total = jnp.cumsum(change)
        first = jnp.cumsum(change > 0) == 1
        admitted = (total <= trust**2 * jnp.sum(kernel**2)) | first & (change > 0)
        found = jnp.where(admitted, found, codes.reshape(-1)[chosen])
    return codes.reshape(-1).at[chosen].set(found).reshape(codes.shape)


def _check_subspace(fraction, trust) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction of pv_tuning must be in (0, 1], got {fraction!r}")
    if trust is not None and not trust >= 0:
        raise ValueError(f"trust of pv_tuning must be at least 0, or None, got {trust!r}")
