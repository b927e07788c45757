"""PAT: Pruning-Aware Tuning for Large Language Models (Liu et al. 2025).

Fine-tuning with low-rank updates learns which channels of the residual stream can go. The base model is frozen. A
hybrid sparsification module stands behind the embedding, every attention and every feed-forward network, before its
output is added to the stream x:

    h = v * m(t) * (y + B A y),      A (r, d), B (d, r), v (d,) its own;   m (d,) one for the whole model.

With trained theta (d,), theta = 0 at first, of T steps

    m(t) = sigmoid(theta / (1 - ln max(t, 1) / ln T + 1e-6)) + max(1/2 - t / T, 0):       m(0) = 1,

from 0.8 T on with t = 0.8 T in the sigmoid and no gradient through it. Three losses join that of the next token, with
d' the channels that shall stay:

    10 |n - d'| / d',  n = number of theta >= 0, whose gradient is that of sum theta
    mean over theta > 0 of (theta - 1/2)^2  +  mean over theta <= 0 of (theta + 1/2)^2
    sum over modules of mean (A A^T - I)^2                                     (`identity`; without it v is fixed to 1)

At the end the d' channels of largest theta stay. A module is linear, and so is merged into the layer before it:
W <- W (I + B A)^T diag(v m) for kernels (in, d) and embeddings. The channels are cut out everywhere, and as RMS norms
then average d' squares instead of d, their gains are multiplied by sqrt(d / d') (and epsilon by d / d').

Training uses the merged weights, too: every step makes kernels from the trained parameters, and the model runs as it
is. This takes the memory of one more copy of the model and of its gradient, in exchange for activations.

Departures: LoRA has no dropout, which acts on activations. theta has a learning rate of its own. The defaults of both
rates make the published 5e-5 over 10^4 steps of any number of steps; the default steps are the paper's 3 epochs, which
on few sequences train nothing, and at least 1000. Exactly d' channels stay, the paper's theta > 0 may be a few
more or less. Means over no theta are 0 (the released code divides by 0 there), v is merged (the released script drops
it), and a tied head becomes one of its own, since only the embedding has a module behind it.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from sparsejax import masks as masks_lib
from sparsejax.compress.base import Compressed, Whole, check_pattern, dropped, warn
from sparsejax.compress.shrink import shrink
from sparsejax.models import Transformer
from sparsejax.models.layers import layer_sizes
from sparsejax.patterns import Unstructured
from sparsejax.selection import top_k_mask

MASKS = ("learned", "fixed")
_FROZEN = 0.8  # share of the steps after which the mask no longer follows theta
_UNSETTLED = 0.1  # distance of a mask from 0 or 1 that is worth a warning
_LEAST_STEPS = 1000  # of a default
_DECAY = 2.77  # of the fixed mask's tail


def pat(
    *,
    steps: int | None = None,
    batch: int = 16,
    learning_rate: float | None = None,
    mask_learning_rate: float | None = None,
    warmup: int | None = None,
    clip_norm: float = 0.3,
    rank: int | None = None,
    lora_rank: int = 20,
    lora_alpha: float = 4.0,
    identity: bool = True,
    mask: str = "learned",
    seed: int = 0,
) -> Whole:
    """Tunes on the given tokens and removes floor(sparsity width) residual channels.

    Args:
      steps: of training, T; None for 3 epochs, at least 1000.
      batch: sequences of a step.
      learning_rate: peak of a cosine after a linear warm-up, of Adam on LoRA and modules; None for 0.5 / steps, at most
        1e-3.
      mask_learning_rate: of theta; None for 0.5 / steps.
      warmup: steps; None for 100, or a tenth of the steps if that is less.
      clip_norm: of the gradient.
      rank: r of the modules; None for 200 / 4096 of the width, at least 1.
      lora_rank, lora_alpha: of the update (lora_alpha / lora_rank) a b of every linear layer of the blocks, experts too.
      identity: whether there are v and its loss.
      mask: "learned", or "fixed": the last channels go, with m = exp(-2.77 t / T) on the way.
      seed: of the first weights and the order of the sequences.

    `run` trains on its tokens; at sparsity 0 it returns the model as it is. The report has "sparsity" (of the blocks'
    kernels), "kept" (channels), "positive" (number of theta > 0 at the end), "steps" and "loss": those of the first and
    the last tenth of the steps, their mean in nats per token.

    Raises:
      ValueError: for numbers out of their range; when it runs, for a pattern, a model other than a `Transformer` with
        RMS norms and without shortcuts, a sparsity that leaves no channel, or sequences of fewer than two tokens.
    """
    masks_lib.choose("mask", mask, MASKS)
    for name, value in (("steps", steps), ("batch", batch), ("rank", rank), ("lora_rank", lora_rank)):
        if value is not None and value < (2 if name == "steps" else 1):
            raise ValueError(f"{name} of pat must be at least {2 if name == 'steps' else 1}, got {value}")

    def run(model, params, tokens, sparsity, pattern=None, *, progress=None) -> Compressed:
        check_pattern("pat", pattern or "unstructured", (Unstructured,))
        target = masks_lib.check_sparsity(sparsity)
        tokens, params = np.asarray(tokens), {name: params[name] for name in model.parts()}
        if not target:
            return Compressed(
                model, params, None, {"sparsity": 0.0, "kept": list(range(getattr(model, "width", 0)))}
            )
        model, params = untied(_checked(model), params)
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"pat trains on sequences of at least two tokens, got tokens of shape {tokens.shape}"
            )
        keep = model.width - dropped(target, model.width)
        length = steps or max(_LEAST_STEPS, math.ceil(3 * len(tokens) / batch))
        width = rank or max(1, round(model.width * 200 / 4096))
        start = jax.jit(lambda key: init(key, model, params, width, lora_rank, identity))
        trained = start(jax.random.key(seed))
        optimizer = _optimizer(
            length,
            min(0.5 / length, 1e-3) if learning_rate is None else learning_rate,
            0.5 / length if mask_learning_rate is None else mask_learning_rate,
            min(100, length // 10) if warmup is None else warmup,
            clip_norm,
        )
        settings = (keep, length, lora_alpha / lora_rank, identity, mask)
        trained, losses = _train(
            model, params, trained, optimizer, settings, tokens, min(batch, len(tokens)), seed, progress
        )
        theta = trained["theta"]
        kept = np.flatnonzero(top_k_mask(theta, keep) if mask == "learned" else np.arange(model.width) < keep)
        if mask == "learned":
            _warn_unsettled(mask_at(theta, length, length), kept)
        small, small_params = merge(model, params, trained, kept, lora_alpha / lora_rank)
        tenth = max(1, length // 10)
        report = {
            "sparsity": 1 - keep / model.width,
            "kept": kept.tolist(),
            "positive": int((theta > 0).sum()),
            "steps": length,
            "loss": {"first": float(np.mean(losses[:tenth])), "last": float(np.mean(losses[-tenth:]))},
        }
        return Compressed(small, small_params, None, report)

    return Whole("pat", run)


# --- the modules -------------------------------------------------------------------------------------


def places(model: Transformer) -> tuple[str, ...]:
    """The subtrees behind which a module stands: embeddings, and the last layer of every sub-block."""
    found = ["embed"]
    for i in range(model.depth):
        size = layer_sizes(model, i)
        found += [f"block_{i}/attention/out"] * bool(size["heads"])
        found += [f"block_{i}/mlp/down"] * bool(size["hidden"])
    return tuple(found)


def init(key, model: Transformer, params, rank: int, lora_rank: int = 20, identity: bool = True) -> dict:
    """The trained parameters, float32, of a model that they leave as it is.

    Returns:
      {"theta": zeros (d,), "modules": {place: {"a" (rank, d), "b" zeros (d, rank), "v" ones (d,), if `identity`}},
      "lora": {kernel: {"a" (..., in, lora_rank), "b" zeros (..., lora_rank, out)}}}. Both a are uniform in
      +-1 / sqrt(their inputs).
    """
    d = model.width

    def uniform(name, shape, fan):
        own = jax.random.fold_in(key, int.from_bytes(name.encode(), "little") % (2**31 - 1))
        return jax.random.uniform(own, shape, minval=-1.0, maxval=1.0) / math.sqrt(fan)

    modules = {}
    for name in places(model):
        modules[name] = {"a": uniform(name, (rank, d), d), "b": jnp.zeros((d, rank))}
        if identity:
            modules[name]["v"] = jnp.ones(d)  # an array of its own: training donates each of them
    lora = {}
    for name, leaf in masks_lib.flatten(params).items():
        if name.startswith("block_") and name.endswith("/kernel") and "/router/" not in name:
            *lead, inputs, outputs = leaf.shape
            a = uniform(f"{name}/lora", (*lead, inputs, lora_rank), inputs)
            lora[name] = {"a": a, "b": jnp.zeros((*lead, lora_rank, outputs))}
    return {"theta": jnp.zeros(d), "modules": modules, "lora": lora}


def materialize(params, trained: dict, mask, scale: float):
    """The parameters with LoRA and the modules merged into them, in the dtypes of `params`; differentiable.

    Args:
      params: of the frozen model.
      trained: as `init` gives it.
      mask: m, float `(d,)`.
      scale: of the low-rank updates.
    """

    def leaf(name, value):
        place = name.rpartition("/")[0]
        module = trained["modules"].get("embed" if place == "positions" else place)
        found = value.astype(jnp.float32)
        if name in trained["lora"]:
            found += scale * trained["lora"][name]["a"] @ trained["lora"][name]["b"]
        if module is not None:
            found += found @ module["a"].T @ module["b"].T
            found *= module.get("v", 1.0) * mask
        return found.astype(value.dtype)

    return masks_lib.map_with_name(leaf, params)


def mask_at(theta, step, steps: int):
    """m(t) of the learned mask, float `(d,)`; its gradient is zero from 0.8 `steps` on.

    Args:
      theta: `(d,)`.
      step: t, from 0; may be traced.
      steps: T, at least 2.
    """
    end = int(_FROZEN * steps)
    at = jnp.clip(step, 1, max(1, end)).astype(jnp.float32)
    sharpness = 1 / (1 - jnp.log(at) / math.log(steps) + 1e-6)
    theta = jnp.where(step < end, theta, jax.lax.stop_gradient(theta))
    return jax.nn.sigmoid(sharpness * theta) + jnp.maximum(0.5 - step / steps, 0)


def fixed_mask_at(width: int, keep: int, step, steps: int):
    """m(t) of the fixed mask: 1 for the first `keep` channels, exp(-2.77 t / T) for the others."""
    return jnp.where(jnp.arange(width) < keep, 1.0, jnp.exp(-_DECAY * step / steps))


def budget_loss(theta, keep: int):
    """10 |n - keep| / keep for n entries >= 0; its gradient is that of n = sum of theta."""
    count, total = jnp.sum(theta >= 0), jnp.sum(theta)
    slope = 10 * jnp.sign(count - keep) / keep
    return 10 * jnp.abs(count - keep) / keep + slope * (total - jax.lax.stop_gradient(total))


def separation_loss(theta):
    """Mean of (theta - 1/2)^2 over positive entries, plus that of (theta + 1/2)^2 over the others."""
    positive = theta > 0

    def mean(values, chosen):
        return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(jnp.sum(chosen), 1)

    return mean((theta - 0.5) ** 2, positive) + mean((theta + 0.5) ** 2, ~positive)


def identity_loss(modules: dict):
    """Sum over modules of mean (A A^T - I)^2."""
    grams = [module["a"] @ module["a"].T for module in modules.values()]
    return sum(jnp.mean((gram - jnp.eye(len(gram))) ** 2) for gram in grams)


# --- training ----------------------------------------------------------------------------------------


def _optimizer(steps, rate, mask_rate, warmup, clip_norm):
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup} of pat must lie in [0, steps={steps})")

    def adam(peak):
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps))

    def labels(trained):
        def label(name, _):
            return "mask" if name == "theta" else "weights"

        return masks_lib.map_with_name(label, trained)

    groups = {"weights": adam(rate), "mask": adam(mask_rate)}
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.partition(groups, labels))


def objective(trained, params, tokens, step, model, settings):
    """(all losses, that of the next token in nats), see the module.

    Args:
      trained, params: trained and frozen parameters.
      tokens: int32 `(batch, length)`.
      step: t.
      model: the frozen model.
      settings: (d', T, scale of LoRA, whether there is an identity loss, kind of mask).
    """
    keep, steps, scale, identity, kind = settings
    theta = trained["theta"]
    mask = mask_at(theta, step, steps) if kind == "learned" else fixed_mask_at(model.width, keep, step, steps)
    logits = model.apply({"params": materialize(params, trained, mask, scale)}, tokens)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))
    total = loss
    if kind == "learned":
        total += budget_loss(theta, keep) + separation_loss(theta)
    if identity:
        total += identity_loss(trained["modules"])
    return total, loss


def _train(model, params, trained, optimizer, settings, tokens, batch, seed, progress):
    """The trained parameters, and the loss of the next token at every step."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(trained, state, params, tokens, step):
        gradient = jax.grad(objective, has_aux=True)
        grads, loss = gradient(trained, params, tokens, step, model, settings)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state, losses, steps = optimizer.init(trained), [], settings[1]
    disable = None if progress is None else not progress
    per_epoch = len(tokens) // batch
    for step in tqdm(range(steps), disable=disable, unit="step", desc="pat"):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(tokens))
        chosen = tokens[order[place * batch : (place + 1) * batch]]
        trained, state, loss = advance(trained, state, params, jnp.asarray(chosen), jnp.int32(step))
        losses.append(loss)
    return trained, np.asarray(jax.device_get(losses))


def _warn_unsettled(mask, kept) -> None:
    """The model that was trained is not the one that is left, unless the mask is 1 where it stays and 0 elsewhere."""
    off = np.abs(np.asarray(mask) - np.isin(np.arange(len(mask)), kept)).max()
    if off > _UNSETTLED:
        warn(
            f"pat's mask has not settled: at the end a channel was {off:.2f} from 0 or 1, so that the loss changes when "
            "channels are cut out; train for more steps"
        )


# --- merging -----------------------------------------------------------------------------------------


def merge(model: Transformer, params, trained: dict, kept, scale: float) -> tuple[Transformer, dict]:
    """The small model: modules and LoRA merged, only the kept channels left, plain RMS norms of their width.

    Norms of queries and keys share `epsilon`, which changes by d / d'; elsewhere the function is that of the full
    model with m = 1 for the kept channels and 0 for the others, up to rounding.

    Args:
      model, params: the frozen model, untied.
      trained: as `init` gives it.
      kept: indices of residual channels.
      scale: of the low-rank updates.
    """
    mask = np.isin(np.arange(model.width), kept).astype(np.float32)
    full = jax.device_get(jax.jit(materialize)(params, trained, mask, scale))
    small, params = shrink(model, full, width=kept)
    ratio = small.norm_width / small.width

    def finish(name, value):
        is_norm = name.endswith("/scale") and "query_norm" not in name and "key_norm" not in name
        return jnp.asarray((value * math.sqrt(ratio)).astype(value.dtype) if is_norm else value)

    return small.clone(norm_width=None, epsilon=small.epsilon * ratio), masks_lib.map_with_name(
        finish, params
    )


def untied(model: Transformer, params: dict) -> tuple[Transformer, dict]:
    """The same function with a head of its own."""
    if not model.tied:
        return model, params
    head = {"kernel": jnp.asarray(params["embed"]["embedding"]).T}
    return model.clone(tied=False), {**params, "head": head}


def _checked(model) -> Transformer:
    if not isinstance(model, Transformer) or model.norm != "rms" or model.linear is not None:
        about = f"{type(model).__name__} with norm={getattr(model, 'norm', None)!r}, linear={getattr(model, 'linear', None)!r}"
        raise ValueError(f"pat needs a Transformer of dense layers with norm='rms', got {about}")
    if any(layer_sizes(model, i)["stream"] for i in range(model.depth)):
        raise ValueError(
            "pat needs a Transformer without shortcuts, whose channels are those of one residual stream"
        )
    return model
