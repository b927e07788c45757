"""A model's hidden states on their way through its blocks, one block in memory at a time.

`Stream` holds the hidden states of all sequences on the host, in the model's dtype, and takes them through one block
after the other in batches. The inputs of a block's linear layers are seen by intercepting the calls of its
`nn.Dense` and `nn.ExpertDense` modules, inside `jax.jit`; blocks of the same shape share what was compiled.

A model takes part if it has `parts`, `start`, `block`, `context` and `finish`, see `sparsejax.models`.
"""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import nn
from sparsejax.compress import statistics
from sparsejax.nn.experts import expert_matmul

ROUTER = "router"  # decides about experts; it is small, and never compressed


class Layer(NamedTuple):
    """A linear kernel of a block.

    Attributes:
      shape: of the kernel, `(in, out)` or `(experts, in, out)`.
      source: the first layer of the block that reads the same inputs; statistics are kept once, under its name.
    """

    shape: tuple[int, ...]
    source: str


class Stream:
    """Hidden states of `tokens` before a block.

    Attributes:
      hidden: numpy `(sequences, length, width)`, the inputs of the next block.
      blocks: the names of the blocks in their order.
    """

    def __init__(self, model, params: Mapping, tokens, batch: int = 8):
        """Embeds the tokens.

        Args:
          model: see the module.
          params: by part, see `model.parts()`; read part by part.
          tokens: int32 `(sequences, length)`, or what else `model.start` takes. Sharded along its first axis, the
            batches are too.
          batch: sequences that go through a block at once.

        Raises:
          ValueError: without a token, for a token outside of the vocabulary, sequences longer than the model takes,
            tokens that are no sequences, batch < 1, or shards that do not divide the batches.
        """
        self.model = model
        self.blocks = tuple(name for name in model.parts() if name.startswith("block_"))
        self._sharding = _batch_sharding(tokens)
        self.tokens = np.asarray(tokens)
        self._batch = batch
        self._shards = _shards(self._sharding)
        _check_tokens(self.tokens, batch, self._shards)
        first = {name: params[name] for name in self._outer()[0]}
        _check_vocabulary(self.tokens, first)
        self.hidden = self._gather(_start(first, self._put(part), model) for part in self._split(self.tokens))

    def block(self, name: str) -> linen.Module:
        """The module of the block called `name`."""
        return self.model.block(self.blocks.index(name))

    def batches(self):
        """Pairs (hidden states, context) of device arrays for every batch."""
        for tokens, hidden in zip(self._split(self.tokens), self._split(self.hidden), strict=True):
            yield self._put(hidden), _context(self._put(tokens), self.model)

    @cached_property
    def layers(self) -> dict[str, dict[str, Layer]]:
        """By block: its linear kernels by their path in it, as `attention/query/kernel`, in order of use.

        Found from shapes alone: no parameters are read.
        """
        tokens = jax.eval_shape(self._put, next(self._split(self.tokens)))
        hidden = jax.eval_shape(self._put, next(self._split(self.hidden)))
        context = jax.eval_shape(partial(_context, model=self.model), tokens)
        layers, seen = {}, {}
        for name in self.blocks:
            block = self.block(name)
            if (block, hidden.shape) not in seen:
                seen[block, hidden.shape] = _find_layers(block, hidden, context)
            layers[name], hidden = seen[block, hidden.shape]
        return layers

    def observe(self, block: linen.Module, params, layers: Mapping[str, Layer], needs, outputs: bool = True):
        """Runs the block as it is: the statistics of its layers' inputs, and its outputs.

        Args:
          block, params: the block and its parameters.
          layers: those whose inputs are wanted, of `self.layers`.
          needs: entries of `sparsejax.compress.statistics`.
          outputs: whether they are wanted.

        Returns:
          ({source: statistics}, outputs). The statistics of expert kernels have a leading axis of experts, and a
          batch's rows of one expert count as one sequence. Outputs are like `hidden`, or None.
        """
        kernels = {layer.source: layer.shape for layer in layers.values()}
        stats = {
            name: _tiled(statistics.init(needs, shape[-2]), shape[:-2]) for name, shape in kernels.items()
        }

        def passing():
            nonlocal stats
            for hidden, context in self.batches():
                stats, y = _observe(stats, params, hidden, context, block, outputs)
                yield y

        found = self._gather(passing(), keep=outputs)
        return stats, found

    def run(self, block: linen.Module, params):
        """The outputs of the block, like `hidden`."""
        return self._gather(self._outputs(block, params))

    def advance(self, block: linen.Module, params) -> None:
        """Moves `hidden` behind the block, batch by batch in its own memory if the block keeps width and dtype."""
        self.hidden = self._gather(self._outputs(block, params), self.hidden)

    def errors(self, block: linen.Module, old, new, names) -> dict[str, float]:
        """||X (W - W')|| / ||X W|| of layers, X their inputs in the `old` block, over the first batch.

        Of expert kernels it is that over all experts; 0 where both norms are.
        """
        hidden, context = next(self.batches())
        kernels = {name: _at(new, name) for name in names}
        found = jax.device_get(_errors(kernels, old, hidden, context, block))
        return {name: float(np.sqrt(a / b)) if b else float(np.sqrt(a)) for name, (a, b) in found.items()}

    def finish(self, params: Mapping, function):
        """`function(logits, tokens)` of every sequence, once all blocks are done; an array per batch.

        Logits exist of one sequence at a time (of every shard), in the dtype that the model gives.

        Args:
          params: by part.
          function: of `(length, classes)` and `(length,)`; traced, and compiled once per function.
        """
        before, after = self._outer()
        tied = before if getattr(self.model, "tied", False) else ()
        outer = {name: params[name] for name in (*tied, *after)}
        for tokens, hidden in zip(self._split(self.tokens), self._split(self.hidden), strict=True):
            yield _finish(outer, self._put(hidden), self._put(tokens), self.model, function, self._shards)

    def _outer(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the parts before the blocks, and after."""
        parts = self.model.parts()
        first, last = (parts.index(name) for name in (self.blocks[0], self.blocks[-1]))
        return parts[:first], parts[last + 1 :]

    def _split(self, array):
        return (array[i : i + self._batch] for i in range(0, len(array), self._batch))

    def _put(self, array):
        if self._sharding is None:
            return jnp.asarray(array)
        return jax.device_put(array, self._sharding)

    def _outputs(self, block, params):
        return (_run(params, hidden, context, block) for hidden, context in self.batches())

    def _gather(self, batches, into=None, keep: bool = True):
        """Batches as one array: `into`, if they fit into it; None if they are not to be kept."""
        done = 0
        for part in batches:
            if not keep:
                continue
            part = np.asarray(part)
            if into is None or (into.shape[1:], into.dtype) != (part.shape[1:], part.dtype):
                into = np.empty((len(self.tokens), *part.shape[1:]), part.dtype)
            into[done : done + len(part)] = part
            done += len(part)
        return into


# --- compiled parts ----------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="model")
def _start(params, tokens, model):
    return model.apply({"params": params}, tokens, method="start")


@partial(jax.jit, static_argnames=("model", "function", "shards"))
def _finish(params, hidden, tokens, model, function, shards):
    def step(arrays):
        hidden, tokens = arrays
        return jax.vmap(function)(model.apply({"params": params}, hidden, method="finish"), tokens)

    # every step has one sequence of each shard, so that no sequence leaves its device
    steps = [x.reshape(shards, -1, *x.shape[1:]).swapaxes(0, 1) for x in (hidden, tokens)]
    return lax.map(step, tuple(steps))


@partial(jax.jit, static_argnames="model")
def _context(tokens, model):
    return model.context(tokens)


@partial(jax.jit, static_argnames="block")
def _run(params, hidden, context, block):
    return block.apply({"params": params}, hidden, **context)


@partial(jax.jit, static_argnames=("block", "wanted"), donate_argnames="stats")
def _observe(stats, params, hidden, context, block, wanted):
    """(statistics, outputs); without outputs (None) the compiler leaves out what follows the last linear layer."""
    new = dict(stats)

    def visit(name, x, *sizes):
        if name not in new:
            return
        if not sizes:
            new[name] = statistics.update(
                new[name], x.reshape(len(x), -1, x.shape[-1]), _without_padding(x, context)
            )
            return
        ends = jnp.cumsum(*sizes)
        rows = jnp.arange(len(x))

        def expert(arguments):
            stats, first, last = arguments
            return statistics.update(stats, x[None], ((rows >= first) & (rows < last))[None])

        # one expert after the other: together they would need as many copies of the rows
        new[name] = lax.map(expert, (new[name], ends - sizes[0], ends))

    outputs = _tapped(block, visit, params, hidden, context)
    return new, outputs if wanted else None


@partial(jax.jit, static_argnames="block")
def _errors(kernels, old, hidden, context, block):
    """(sum of (x (W - W'))^2, sum of (x W)^2) by the name of the layer."""
    found = {}

    def visit(name, x, *sizes):
        if name in kernels:
            before, after = (k.astype(jnp.float32) for k in (_at(old, name), kernels[name]))
            product = partial(expert_matmul, sizes=sizes[0]) if sizes else jnp.matmul
            x, flags = x.astype(jnp.float32), _without_padding(x, context)
            x = x if flags is None else x * flags[..., None]
            with jax.default_matmul_precision("highest"):
                found[name] = [jnp.sum(product(x, kernel) ** 2) for kernel in (before - after, before)]

    _tapped(block, visit, old, hidden, context)
    return found


def _without_padding(x, context):
    """Bools `(sequences, length)`, which tokens are none, of a model whose blocks take a padding mask; else None."""
    mask = context.get("mask")
    return mask if mask is not None and mask.shape == x.shape[:-1] else None


def _find_layers(block, hidden, context):
    """({path: Layer}, the shape of the outputs) of a block for the shapes of its inputs."""
    key = jax.random.key(0)
    params = jax.eval_shape(lambda x, more: block.init(key, x, **more), hidden, context)["params"]
    found, sources = {}, {}

    def visit(name, x, *sizes):
        if name.split("/")[-2] != ROUTER:
            # the inputs are kept, or another array could get the same id
            found[name] = Layer(_at(params, name).shape, sources.setdefault(id(x), (name, x))[0])

    return found, jax.eval_shape(partial(_tapped, block, visit), params, hidden, context)


def _tapped(block, visit, params, hidden, context):
    """The outputs of a block; `visit(name, x, ...)` gets the path of every linear kernel and its layer's inputs."""
    active = set()

    def tap(call, args, kwargs, about):
        name = "/".join((*about.module.path, "kernel"))
        linear = isinstance(about.module, (linen.Dense, nn.ExpertDense)) and about.method_name == "__call__"
        if not linear or name in active:  # a layer's own call goes on to that of its base class
            return call(*args, **kwargs)
        active.add(name)
        visit(name, *args, *kwargs.values())
        y = call(*args, **kwargs)
        active.remove(name)
        return y

    with linen.intercept_methods(tap):
        return block.apply({"params": params}, hidden, **context)


# --- helpers -----------------------------------------------------------------------------------------


def _at(params, name: str):
    for key in name.split("/"):
        params = params[key]
    return params


def _tiled(tree, shape):
    return jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), tree)


def _batch_sharding(tokens):
    """How to lay out an array of sequences as the tokens are; None on one device."""
    sharding = getattr(tokens, "sharding", None)
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))


def _shards(sharding) -> int:
    """How many ways the sequences are sharded."""
    return 1 if sharding is None else sharding.mesh.size // sharding.shard_shape((sharding.mesh.size,))[0]


def _check_tokens(tokens, batch: int, shards: int) -> None:
    if tokens.size == 0:
        raise ValueError(f"there are no tokens to read: their shape is {tokens.shape}")
    if tokens.ndim < 2:
        raise ValueError(f"tokens must be sequences, (sequences, length), got the shape {tokens.shape}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    for size in {min(batch, len(tokens)), len(tokens) % batch or batch}:
        if size % shards:
            raise ValueError(
                f"the tokens are sharded {shards} ways, which does not divide a batch of {size} sequences "
                f"({len(tokens)} in all, batch={batch})"
            )


def _check_vocabulary(tokens, params) -> None:
    """Raises ValueError for integer tokens that have no row in the embedding (JAX would clip them)."""
    table = params.get("embed", {}).get("embedding") if isinstance(params.get("embed"), Mapping) else None
    if table is None or not np.issubdtype(tokens.dtype, np.integer):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= table.shape[0]:
        raise ValueError(
            f"token {low if low < 0 else high} is outside of the vocabulary, 0 to {table.shape[0] - 1}"
        )
