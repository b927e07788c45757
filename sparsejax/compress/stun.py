"""STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning (Lee et al. 2024).

First whole experts go, then single weights of those that stay. With R_e the router's weights of expert e, and C_ef the
number of calibration tokens that are routed to both e and f, experts of a layer are as far apart as

    d_ef = coactivation (-C_ef / mean of C over pairs) + router ||R_e - R_f||_2.

Pairs of all layers, nearest first, merge the clusters of their experts if d < tau for all pairs of the two clusters
(complete linkage); tau is the smallest for which at most the wanted number of clusters is left, and merging
ends when exactly that many are. Of a cluster the expert stays whose weights are nearest to the cluster's mean, with its
router weights; in a layer of at most `average` clusters, the mean of weights and router takes its place. What is
missing to the total sparsity is then pruned from the remaining layers by a layer-wise method.

Departures: the released code checks one expert's distances to the other cluster before a merge; here all pairs are
checked, so that every cluster really is complete. It doubles and halves tau until the number of clusters fits, which
may never happen (distances tie, and one merge can prevent others); here every distance is tried, layer by layer, which
takes E^4 / 4 steps for E experts. The default of the second step counts weights over a layer, because counts per output
cannot meet a total exactly.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparsejax import masks as masks_lib
from sparsejax.compress.base import Compressed, Layerwise, Whole, check_pattern, dropped
from sparsejax.compress.calibration import prune_layers
from sparsejax.compress.shrink import shrink
from sparsejax.compress.stream import Stream
from sparsejax.compress.wanda import wanda
from sparsejax.models import Transformer
from sparsejax.models.layers import layer_sizes
from sparsejax.patterns import NM, Unstructured

Clusters = list[list[list[int]]]  # of every layer, each a list of experts


def stun(
    method: Layerwise | None = None,
    *,
    experts: float = 0.25,
    coactivation: float = 1.0,
    router: float = 0.0,
    average: int = 3,
    allocation: str | Callable = "uniform",
    batch: int = 8,
) -> Whole:
    """Removes similar experts, then prunes weights up to the total sparsity.

    Args:
      method: of the second step, default `wanda(scope="layer")`. The total is exact if it drops floor(sparsity in out)
        weights of a layer; methods that count per output fall short by what they round down.
      experts: share of all experts that is removed, in [0, 1): floor(experts n) of n.
      coactivation, router: factors of the two distances, not negative. Without coactivation no token is routed.
      average: layers of so many clusters or fewer average them; 0 never does.
      allocation: of the second step: "uniform", or `(model, params, tokens, sparsity) -> {layer: sparsity}` such as
        `owl`, which is shifted to meet the total.
      batch: sequences that go through a block at once.

    `sparsity` is the share of the weights of the linear layers (experts included, routers not) that are gone or zero;
    at 0 the model stays as it is. With N:M it must be None: the remaining experts are pruned to N:M. The report is that
    of `prune_layers` with "sparsity" over the original weights, and "experts" {block: {"clusters", "kept",
    "averaged"}}.

    Raises:
      ValueError: for a number out of its range; when it runs, for a model that is no `Transformer` with experts,
        `coactivation` in one whose tokens go through a single expert, more
        experts than can go (a layer keeps as many as a token goes through), a sparsity below what the experts take
        away, and as `prune_layers`.
    """
    method = wanda(scope="layer") if method is None else method
    if not 0 <= experts < 1:
        raise ValueError(f"experts must be a share in [0, 1), got {experts}")
    if isinstance(allocation, str):
        masks_lib.choose("allocation", allocation, ("uniform",))
    if min(coactivation, router) < 0 or not coactivation + router:
        raise ValueError(
            f"coactivation={coactivation} and router={router} must not be negative, and one of them positive"
        )

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None) -> Compressed:
        pattern = check_pattern("stun", pattern or "unstructured", (Unstructured, NM))
        free = not isinstance(pattern, NM)
        if not free and sparsity is not None:
            raise ValueError(
                f"with the pattern {pattern.n}:{pattern.m} stun needs sparsity None, got {sparsity}"
            )
        if free and not masks_lib.check_sparsity(sparsity):
            report = {"method": method.name, "sparsity": 0.0, "experts": {}, "layers": {}}
            return Compressed(model, params, masks_lib.dense_masks(params), report)
        blocks = _expert_blocks(model)
        if coactivation and model.experts_per_token < 2:
            raise ValueError(
                f"no two experts share a token with experts_per_token={model.experts_per_token}, so that stun needs "
                f"coactivation=0.0 and router=1.0, got coactivation={coactivation} and router={router}"
            )
        counts = coactivations(model, params, tokens, batch, progress) if coactivation else {}
        spaces = [distances(_router(params, i), counts.get(i), coactivation, router) for i in blocks]
        total = sum(map(len, spaces))
        clusters = find_clusters(spaces, total - dropped(experts, total), model.experts_per_token)
        small, small_params, about = merge(model, params, dict(zip(blocks, clusters, strict=True)), average)
        before, shares = _weights(model, params), "uniform"
        if free:
            wanted = before - dropped(sparsity, before)
            shares = _shares(allocation, small, small_params, tokens, wanted, sparsity)
        budget = 0.0 if free else None
        options = {"allocation": shares, "batch": batch, "progress": progress}
        found = prune_layers(method, small, small_params, tokens, budget, pattern, **options)
        kept = sum(round(layer["density"] * layer["size"]) for layer in found.report["layers"].values())
        report = {**found.report, "asked": sparsity, "sparsity": 1 - kept / before, "experts": about}
        return found._replace(report=report)

    return Whole("stun", run)


# --- which experts are alike -------------------------------------------------------------------------


def coactivations(model, params: Mapping, tokens, batch: int = 8, progress: bool | None = None) -> dict:
    """{block: C}, int64 `(experts, experts)`: how many tokens the router sends to both; the diagonal is 0.

    The blocks run as they are, one after the other.
    """
    stream, found = Stream(model, params, tokens, batch), {}
    disable = None if progress is None else not progress
    for i, name in enumerate(tqdm(stream.blocks, disable=disable, unit="block", desc="routers")):
        block, outputs = stream.block(name), []
        if i not in _expert_blocks(model):
            stream.hidden = stream.run(block, params[name])
            continue
        found[i] = 0
        for hidden, context in stream.batches():
            y, logits = _routed(params[name], hidden, context, block)
            _, chosen = jax.lax.top_k(logits, min(model.experts_per_token, logits.shape[-1]))
            hits = np.asarray(jax.nn.one_hot(chosen, logits.shape[-1]).sum(-2), np.int64).reshape(
                -1, logits.shape[-1]
            )
            found[i] += hits.T @ hits
            outputs.append(np.asarray(y))
        np.fill_diagonal(found[i], 0)
        stream.hidden = np.concatenate(outputs)
    return found


@partial(jax.jit, static_argnames="block")
def _routed(params, hidden, context, block):
    """The outputs of a block, and the logits of its router."""
    y, state = block.apply(
        {"params": params},
        hidden,
        **context,
        capture_intermediates=lambda module, _: module.name == "router",
        mutable=["intermediates"],
    )
    return y, state["intermediates"]["mlp"]["router"]["__call__"][0].astype(jnp.float32)


def distances(router_weights, counts, coactivation: float = 1.0, router: float = 0.0) -> np.ndarray:
    """d_ef of one layer, float64 `(experts, experts)`, infinite on the diagonal.

    Args:
      router_weights: `(width, experts)`.
      counts: C of `coactivations`, or None if its factor is 0. If no two experts share a token, that term is 0.
      coactivation, router: the factors of the two terms.
    """
    rows = np.asarray(router_weights, np.float64).T
    found = router * np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    if coactivation:
        pairs = len(rows) * (len(rows) - 1)
        found = found - coactivation * counts * (pairs / max(1, counts.sum()))
    np.fill_diagonal(found, np.inf)
    return found


def find_clusters(spaces: Sequence[np.ndarray], target: int, least: int = 1) -> Clusters:
    """The clusters of all layers for the smallest tau that leaves at most `target` of them, cut at `target`.

    Args:
      spaces: the distances of every layer.
      target: how many clusters all layers have together.
      least: how many every layer keeps (or all its experts, if it has fewer).

    Raises:
      ValueError: for a target below what must be kept.
    """
    needed = sum(min(least, len(space)) for space in spaces)
    if target < needed:
        raise ValueError(
            f"{target} experts cannot be kept: {len(spaces)} layers need {least} each, {needed} in all"
        )
    events, total = [], sum(map(len, spaces))
    for space in spaces:
        values = np.unique(space[np.triu_indices(len(space), 1)])
        counts = [len(space), *(len(cluster([space], _above(value), 0, least)[0]) for value in values)]
        events += zip(values, np.diff(counts), strict=True)
    tau = -np.inf
    for value, change in sorted(events):  # a larger tau may also leave more clusters, so that all are tried
        if total <= target and value >= tau:
            break
        tau, total = _above(value), total + change
    return cluster(spaces, tau, target, least)


def _above(value):
    """The smallest tau with which pairs at this distance merge."""
    return np.nextafter(value, np.inf)


def cluster(spaces: Sequence[np.ndarray], tau: float, target: int = 0, least: int = 1) -> Clusters:
    """Complete-linkage clusters: any two experts of one are nearer than tau.

    Args:
      spaces, least: as in `find_clusters`.
      tau: distances from it on are never merged.
      target: merging ends when all layers together have so many clusters.
    """
    owners = [[[e] for e in range(len(space))] for space in spaces]  # of each expert its cluster
    counts, total = [len(space) for space in spaces], sum(map(len, spaces))
    pairs = [
        (space[e, f], layer, e, f)
        for layer, space in enumerate(spaces)
        for e, f in zip(*np.triu_indices(len(space), 1), strict=True)
        if space[e, f] < tau
    ]
    for _, layer, e, f in sorted(pairs):
        if total <= target:
            break
        own, other = owners[layer][e], owners[layer][f]
        if own is other or counts[layer] <= least or spaces[layer][np.ix_(own, other)].max() >= tau:
            continue  # linkage only grows: a pair that is refused once stays refused
        own += other
        for member in other:
            owners[layer][member] = own
        counts[layer], total = counts[layer] - 1, total - 1
    return [sorted({id(c): sorted(c) for c in layer}.values()) for layer in owners]


# --- what is left of them ----------------------------------------------------------------------------


def merge(model, params: Mapping, clusters: Mapping[int, list[list[int]]], average: int = 3):
    """One expert per cluster.

    Args:
      model, params: a `Transformer` with experts.
      clusters: {block: its clusters}.
      average: blocks with so many clusters or fewer average them.

    Returns:
      `(model, params, {block name: {"clusters", "kept", "averaged"}})`; what is averaged has the place of the cluster's
      first expert.
    """
    params, kept, about = {name: params[name] for name in model.parts()}, {}, {}
    for i, groups in clusters.items():
        name = f"block_{i}"
        mlp = params[name]["mlp"]
        merging = sum(map(len, groups)) > len(groups)
        averaged = merging and len(groups) <= average
        if averaged:
            kept[i] = [group[0] for group in groups]
            params[name] = {
                **params[name],
                "mlp": jax.tree.map(partial(_averaged, groups), mlp, _expert_axes(mlp)),
            }
        elif merging:
            kept[i] = [_nearest(mlp, group) for group in groups]
        about[name] = {
            "clusters": groups,
            "kept": sorted(kept.get(i, range(len(groups)))),
            "averaged": averaged,
        }
    small, small_params = shrink(model, params, experts=kept)
    return small, small_params, about


def _expert_axes(mlp):
    """The axis of experts of every leaf of a feed-forward network."""
    return {
        name: jax.tree.map(lambda _, at=name: -1 if at == "router" else 0, layer)
        for name, layer in mlp.items()
    }


def _averaged(groups, leaf, axis):
    """The leaf with the mean of every group in the place of its first expert."""
    found = np.moveaxis(np.array(leaf), axis, 0)
    for group in groups:
        found[group[0]] = np.mean(found[group].astype(np.float32), axis=0)
    return jnp.asarray(np.moveaxis(found, 0, axis))


def _nearest(mlp, group: list[int]) -> int:
    """The expert of a group whose weights are nearest to their mean; the first of equals."""
    squares = np.zeros(len(group))
    for leaf in jax.tree.leaves({name: layer for name, layer in mlp.items() if name != "router"}):
        own = np.asarray(leaf[np.array(group)], np.float32).reshape(len(group), -1)
        squares += ((own - own.mean(0)) ** 2).sum(1)
    return group[int(np.argmin(squares))]


# --- the second step ---------------------------------------------------------------------------------


def exact_shares(
    sizes: Mapping[str, tuple[int, ...]], zeros: int, asked: Mapping | None = None
) -> dict[str, float]:
    """The sparsity of every layer so that, over a layer floored, they drop `zeros` weights in all.

    Args:
      sizes: {layer: shape}, `(in, out)` or `(experts, in, out)`, where every expert drops as many.
      zeros: how many.
      asked: {layer: sparsity} that is shifted to the total and clipped to [0, 1); None for equal ones.
    """
    weights = {name: math.prod(shape) for name, shape in sizes.items()}
    asked = dict.fromkeys(sizes, 0.0) if asked is None else asked
    low, high = -1.0 - max(asked.values()), 1.0 - min(asked.values())
    for _ in range(100):
        shift = (low + high) / 2
        total = sum(min(max(asked[name] + shift, 0.0), 1.0) * weights[name] for name in sizes)
        low, high = (shift, high) if total < zeros else (low, shift)
    one = {name: math.prod(shape[-2:]) for name, shape in sizes.items()}
    drops = {name: min(dropped(min(max(asked[name] + low, 0.0), 1.0), n), n - 1) for name, n in one.items()}
    rest = zeros - sum(drops[name] * weights[name] // one[name] for name in sizes)
    # experts drop in steps of their number, single layers weight by weight: the latter take up the rest
    while rest:
        open_ = [
            name for name, n in one.items() if 0 < weights[name] // one[name] <= rest and drops[name] < n - 1
        ]
        if not open_:
            raise ValueError(
                f"{zeros} of {sum(weights.values())} weights cannot be dropped: {rest} are left over"
            )
        for name in sorted(open_, key=lambda name: -weights[name] // one[name]):
            count = min(
                rest // (weights[name] // one[name]), max(1, rest // len(open_)), one[name] - 1 - drops[name]
            )
            drops[name], rest = drops[name] + count, rest - count * weights[name] // one[name]
    return {name: drops[name] / one[name] for name in sizes}


def _shares(allocation, model, params, tokens, wanted: int, sparsity: float):
    """The sparsity of every layer that leaves `wanted` weights."""
    sizes = _sizes(model, params)
    total = sum(map(math.prod, sizes.values()))
    if total < wanted:
        raise ValueError(
            f"without the experts {total} weights are left, but sparsity {sparsity:g} keeps {wanted}: remove fewer experts"
        )
    asked = allocation(model, params, tokens, 1 - wanted / total) if callable(allocation) else None
    return exact_shares(sizes, total - wanted, asked)


def _sizes(model, params) -> dict[str, tuple[int, ...]]:
    """The shapes of the linear kernels of the blocks, without routers."""
    blocks = {f"block_{i}": params[f"block_{i}"] for i in range(model.depth)}
    leaves = masks_lib.flatten(blocks).items()
    return {name: leaf.shape for name, leaf in leaves if name.endswith("/kernel") and "/router/" not in name}


def _weights(model, params) -> int:
    return sum(map(math.prod, _sizes(model, params).values()))


def _router(params, i: int) -> np.ndarray:
    return np.asarray(params[f"block_{i}"]["mlp"]["router"]["kernel"], np.float32)


def _expert_blocks(model) -> list[int]:
    """The blocks with experts; ValueError if there is none."""
    found = []
    if isinstance(model, Transformer):
        sizes = [layer_sizes(model, i) for i in range(model.depth)]
        found = [i for i, size in enumerate(sizes) if size["experts"] and size["hidden"]]
    if not found:
        raise ValueError(f"stun needs a Transformer with experts, got {type(model).__name__} without")
    return found
