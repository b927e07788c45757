"""ZipLM: Inference-Aware Structured Pruning of Language Models (Kurtic, Frantar, Alistarh 2023).

1. Every `out` and `down` goes through structured OBS (`sparsejax.compress.obs`): its head groups or channels go
   one at a time, the others making up for them. Snapshots at some sizes (every number of head groups, channels as
   ff 0.9^i, nothing) are the options of the layer, each with the error ||X (W - W')|| / ||X W||.
2. The time of every option is measured here, or looked up in a table (`sparsejax.compress.latency`).
3. `sparsejax.compress.spdy` chooses options within a budget of time; those it tries are stitched together and
   evaluated on calibration tokens.
4. The model shrinks. The gradual mode is a loop over growing speed-ups with a fine-tuning in between, for which
   `distillation_loss` has the paper's loss.

Departures: statistics are those of the dense model, since options are made before it is known what is removed
elsewhere. Without a speed-up, weights take the place of time.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.compress.base import Whole
from sparsejax.compress.groups import STRUCTURES, bound, consumer, prepare, remove, share_of, units_of, watch
from sparsejax.compress.latency import REPEATS, measure_latency, time_models, time_of
from sparsejax.compress.obs import Snapshot, obs_database
from sparsejax.compress.shrink import CONSUMERS, linear_weights
from sparsejax.compress.spdy import spdy_search


def grid(count: int, sub: str, ratio: float = 0.9) -> list[int]:
    """The sizes of a database, falling: every number of head groups; channels as count ratio^i; and 0."""
    if sub == "attention":
        return list(range(count, -1, -1))
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(max(1, min(sizes[-1] - 1, round(count * ratio ** len(sizes)))))
    return [*sizes, 0]


def distillation_loss(
    logits, teacher_logits, states, teacher_states, labels, *, weights=(1.0, 1.0, 1.0), chosen=None
):
    """The loss of fine-tuning between two steps of the gradual mode.

        weights[0] cross entropy + weights[1] KL(teacher || student) + weights[2] token distillation,

    all means over the chosen positions; token distillation is the mean over layers of ||h_student - h_teacher||_2
    between layers of the same index, which shrinking leaves equally wide. The paper tunes the weights by task;
    the defaults are ours.

    Args:
      logits, teacher_logits: `(batch, length, classes)`.
      states, teacher_states: hidden states after each block, sequences of `(batch, length, width)`; no gradient
        flows into the teacher's.
      labels: int32 `(batch, length)`.
      weights: of the three terms.
      chosen: optional bools `(batch, length)`: the positions that are no padding.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for different numbers of states, or none while their weight is not 0.
    """
    if len(states) != len(teacher_states) or (weights[2] and not states):
        raise ValueError(
            f"student and teacher need a state of every block, got {len(states)} and {len(teacher_states)}"
        )
    logits = logits.astype(jnp.float32)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32))
    flags = jnp.ones(labels.shape) if chosen is None else chosen.astype(jnp.float32)

    def mean(values):
        return jnp.sum(values * flags) / jnp.maximum(jnp.sum(flags), 1)

    task = mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    divergence = mean(jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), -1))
    distances = [
        mean(optax.safe_norm((a - jax.lax.stop_gradient(b)).astype(jnp.float32), 1e-12, axis=-1))
        for a, b in zip(states, teacher_states, strict=True)
    ]
    tokens = sum(distances) / max(len(distances), 1)
    return weights[0] * task + weights[1] * divergence + weights[2] * tokens


def ziplm(
    *,
    speedup: float | None = None,
    latency: Mapping | None = None,
    shape: tuple[int, int] | None = None,
    damping: float = 0.01,
    ratio: float = 0.9,
    evaluations: int = 1000,
    starts: int = 100,
    patience: int = 100,
    sequences: int = 32,
    seed: int = 0,
    repeats: int = REPEATS,
    batch: int = 8,
) -> Whole:
    """Heads and channels for a speed-up that is measured, by structured OBS and a search over layers.

    With `speedup`, `run`'s sparsity must be None; without, the budget is the blocks' weights: sparsity is the share
    of them that is removed, and the sizes that the search chose are moved by single channels to reach it.

    The snapshots are on the host in float32, in all about 1 / (1 - ratio) times the `down` kernels and half as many
    times the `out` kernels as a block has head groups; without `speedup` also the Gram matrices of their inputs. The
    stitched model is on the device, whole.

    Args:
      speedup: of the whole model, at least 1: its time divided by that of the result.
      latency: a table of `measure_latency`; None measures one. The speed-up is relative to its "dense" entry, so
        that the gradual mode keeps the table of the first model.
      shape: (sequences, length) of the measured input; None for a batch of the tokens.
      damping: see `obs_database`.
      ratio: of neighbouring numbers of channels in the database.
      evaluations: limit of stitched models that are evaluated.
      starts, patience, seed: of `spdy_search`.
      sequences: calibration sequences on which stitched models are evaluated.
      repeats: of time measurements, whose median counts.
      batch: sequences that go through a block, or the stitched model, at once.

    Returns:
      A method whose report has also "loss" (of the stitched model on those sequences), "evaluations" and "choice";
      with a speed-up "asked", "predicted" (from the table), "speedup" (of the result over the given model, measured
      in turns) and "latency", the table.

    Raises:
      ValueError: for a speed-up below 1 or a ratio outside (0, 1); in `run`, for both or neither of speed-up and
        sparsity, and a target that no choice meets.
    """
    if speedup is not None and not speedup >= 1:
        raise ValueError(f"speedup must be at least 1, got {speedup}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be in (0, 1), got {ratio}")

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None):
        if (speedup is None) == (sparsity is None):
            raise ValueError(
                f"ziplm needs a speedup or a sparsity, got speedup={speedup} and sparsity={sparsity}"
            )
        sparsity = prepare("ziplm", model, 0.0 if sparsity is None else sparsity, pattern)
        where = shape or (min(batch, len(tokens)), int(np.shape(tokens)[1]))
        timing = {"dtype": params["embed"]["embedding"].dtype, "repeats": repeats}
        units = units_of(model, tuple(STRUCTURES))
        least = {key: int(key in bound(model, units)) for key in units}
        sizes = {
            key: [size for size in grid(entry.count, key[1], ratio) if size >= least[key]]
            for key, entry in units.items()
        }
        if speedup is None:
            table = None
            times = [[size * units[key].weight for size in sizes[key]] for key in units]
            share = share_of("ziplm", units, sparsity, linear_weights(params, model.depth))
            budget = (1 - share) * sum(entry.count * entry.weight for entry in units.values())
        else:
            table = latency or measure_latency(model, sizes, *where, **timing)
            times = [[time_of(table, key, size) for size in sizes[key]] for key in units]
            budget = table["dense"] / speedup - table["rest"]
            if budget <= 0:
                raise ValueError(
                    f"a speed-up of {speedup} leaves no time for the blocks, because the rest takes {table['rest']:g} of "
                    f"{table['dense']:g} milliseconds"
                )
        database = _Database(model, params, tokens, units, sizes, damping, batch, progress, table is None)
        stitched = _Stitched(model, params, np.asarray(tokens)[:sequences], database, batch)

        def sized(choice):
            return {key: sizes[key][option] for key, option in zip(units, choice, strict=True)}

        search = spdy_search(
            [[database.at(key, size).error for size in sizes[key]] for key in units],
            times,
            budget,
            lambda choice: stitched(sized(choice)),
            starts=starts,
            patience=patience,
            limit=evaluations,
            seed=seed,
        )
        chosen, loss = sized(search.choice), search.loss
        if table is None:
            chosen = _move(chosen, least, database, budget)
            loss = stitched(chosen)
        findings = {
            "loss": loss,
            "evaluations": search.evaluations,
            "choice": {f"block_{i}/{sub}": size for (i, sub), size in chosen.items()},
        }
        kept = {key: database.at(key, size).kept for key, size in chosen.items()}
        kernels = {key: database.kernel(key, size) for key, size in chosen.items()}
        done = remove(
            "ziplm", model, params, tokens, sparsity, kept, batch=batch, kernels=kernels, findings=findings
        )
        if table is not None:
            predicted = table["rest"] + sum(time_of(table, key, size) for key, size in chosen.items())
            pair = time_models({"before": model, "after": done.model}, *where, **timing)
            done.report["asked"] = speedup
            done.report["predicted"] = table["dense"] / predicted
            done.report["speedup"] = pair["before"] / pair["after"]
            done.report["latency"] = dict(table)
        return done

    return Whole("ziplm", run)


class _Database:
    """Snapshots of all sub-blocks; if `more`, Gram matrices are kept to make those of other sizes when asked for."""

    def __init__(self, model, params, tokens, units, sizes, damping, batch, progress, more: bool):
        self.units, self._params, self._damping = units, params, damping
        self._grams, self._found = {}, {}
        for i, seen in watch(model, params, tokens, ("gram",), batch=batch, progress=progress):
            for key in (key for key in units if key[0] == i):
                gram = np.asarray(seen.stats[f"{key[1]}/{CONSUMERS[key[1]]}/kernel"]["gram"])
                self._found[key] = self._make(key, gram, sizes[key])
                if more:
                    self._grams[key] = gram

    def at(self, key, size: int) -> Snapshot:
        """A sub-block at a size."""
        if size not in self._found[key]:
            self._found[key] |= self._make(key, self._grams[key], [size])
        return self._found[key][size]

    def kernel(self, key, size: int):
        """Its kernel in the dense shape, zero where structures are gone; float32."""
        snapshot = self.at(key, size)
        rows = np.repeat(snapshot.kept, self.units[key].shared)
        kernel = np.zeros((rows.size, snapshot.rows.shape[1]), np.float32)
        kernel[rows] = snapshot.rows
        return kernel

    def _make(self, key, gram, sizes):
        kernel = consumer(self._params[f"block_{key[0]}"], key[1])
        try:
            return obs_database(kernel, gram, self.units[key].count, sizes, damping=self._damping).snapshots
        except ValueError as error:
            raise ValueError(f"block_{key[0]}/{key[1]}: {error}") from None


class _Stitched:
    """The mean loss per predicted token of the dense model with the snapshots of {(block, sub-block): size} in it."""

    def __init__(self, model, params, tokens, database, batch):
        self._model, self._database = model, database
        self._params = jax.tree.map(jnp.asarray, {part: params[part] for part in model.parts()})
        self._tokens = [tokens[at : at + batch] for at in range(0, len(tokens), batch)]

    def __call__(self, chosen) -> float:
        params = dict(self._params)
        for (i, sub), size in chosen.items():
            part = dict(params[f"block_{i}"])
            layer = part[sub][CONSUMERS[sub]]
            kernel = self._database.kernel((i, sub), size).astype(layer["kernel"].dtype)
            part[sub] = {**part[sub], CONSUMERS[sub]: {**layer, "kernel": kernel}}
            params[f"block_{i}"] = part
        losses = [float(_loss(params, tokens, self._model)) * len(tokens) for tokens in self._tokens]
        return sum(losses) / sum(map(len, self._tokens))


@partial(jax.jit, static_argnames="model")
def _loss(params, tokens, model):
    logits = model.apply({"params": params}, tokens)[:, :-1]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def _move(chosen, least, database, budget: float) -> dict:
    """The sizes with single channels more or less, not below the least, as near to the budget of weights as that goes.

    Networks of the largest error get them first, those that are gone altogether last.
    """
    chosen, units = dict(chosen), database.units
    slack = budget - sum(size * units[key].weight for key, size in chosen.items())
    channels = [key for key in chosen if key[1] == "mlp"]
    for key in sorted(channels, key=lambda key: (chosen[key] == 0, -database.at(key, chosen[key]).error)):
        unit = units[key]
        step = int(np.clip(round(slack / unit.weight), least[key] - chosen[key], unit.count - chosen[key]))
        chosen[key] += step
        slack -= step * unit.weight
    return chosen


__all__ = ["distillation_loss", "grid", "ziplm"]
