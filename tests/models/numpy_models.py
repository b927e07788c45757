"""Transformers in plain numpy, float64, one head and one query at a time, from the papers' equations."""

import math

import numpy as np

erf = np.vectorize(math.erf)


def double(tree):
    return {k: double(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def affine(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(p, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def rms_norm(p, x, epsilon, width=None):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) / (width or x.shape[-1]) + epsilon) * p["scale"]


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def turn(x, position, theta):
    """Rotary: entries i and i + h/2 are a complex number, multiplied by exp(1j position theta^(-2i/h))."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-2.0 * np.arange(half) / len(x)))
    return np.concatenate([z.real, z.imag])


def attention(p, x, heads, kv_heads=None, theta=None, window=None, causal=True, qk_epsilon=None, mask=None):
    """For one sequence (length, width)."""
    query, key, value = (affine(p[name], x) for name in ("query", "key", "value"))
    size, shared = query.shape[1] // heads, heads // (kv_heads or heads)
    out = np.zeros_like(query)
    for head in range(heads):
        mine, theirs = (slice(h * size, (h + 1) * size) for h in (head, head // shared))
        q, k, v = query[:, mine], key[:, theirs], value[:, theirs]
        if qk_epsilon is not None:
            q, k = rms_norm(p["query_norm"], q, qk_epsilon), rms_norm(p["key_norm"], k, qk_epsilon)
        if theta is not None:
            q, k = (np.stack([turn(row, t, theta) for t, row in enumerate(part)]) for part in (q, k))
        for i in range(len(x)):
            seen = np.arange(len(x))
            if causal:
                seen = seen[(seen <= i) & (seen > i - (window or len(x)))]
            if mask is not None:
                seen = seen[np.asarray(mask, bool)[seen]]
            out[i, mine] = softmax(k[seen] @ q[i] / math.sqrt(size)) @ v[seen]
    return affine(p["out"], out)


def swiglu(p, x):
    return affine(p["down"], silu(affine(p["gate"], x)) * affine(p["up"], x))


def mixtral_mlp(p, x, k):
    """Every token by itself, through its k experts of largest probability."""
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        probabilities = softmax(row @ p["router"]["kernel"])
        best = np.argsort(-probabilities)[:k]
        for e in best:
            expert = {name: {"kernel": p[name]["kernel"][e]} for name in ("up", "gate", "down")}
            y[t] += probabilities[e] / probabilities[best].sum() * swiglu(expert, row)
    return y


def blocks(p):
    return (p[f"block_{i}"] for i in range(sum(name.startswith("block_") for name in p)))


def llama(
    params, tokens, *, heads, kv_heads, theta, epsilon, window=None, qk_norm=False, experts_per_token=None
):
    """Llama; with a window Mistral, with `qk_norm` Qwen3, with experts Mixtral. Untied head."""
    p = double(params)
    out = []
    for sequence in np.asarray(tokens):
        x = p["embed"]["embedding"][sequence]
        for b in blocks(p):
            normed = rms_norm(b["norm_0"], x, epsilon)
            qk_epsilon = epsilon if qk_norm else None
            x = x + attention(b["attention"], normed, heads, kv_heads, theta, window, qk_epsilon=qk_epsilon)
            normed = rms_norm(b["norm_1"], x, epsilon)
            x = x + (
                mixtral_mlp(b["mlp"], normed, experts_per_token)
                if experts_per_token
                else swiglu(b["mlp"], normed)
            )
        out.append(affine(p["head"], rms_norm(p["norm"], x, epsilon)))
    return np.stack(out)


def gpt2(params, tokens, *, heads, epsilon, activation=gelu_tanh, position_offset=0):
    """GPT-2; with relu and an offset of two OPT. The head is the embedding."""
    p = double(params)
    out = []
    for sequence in np.asarray(tokens):
        x = p["embed"]["embedding"][sequence]
        x = x + p["positions"]["embedding"][position_offset : position_offset + len(sequence)]
        for b in blocks(p):
            x = x + attention(b["attention"], layer_norm(b["norm_0"], x, epsilon), heads)
            hidden = activation(affine(b["mlp"]["up"], layer_norm(b["norm_1"], x, epsilon)))
            x = x + affine(b["mlp"]["down"], hidden)
        out.append(layer_norm(p["norm"], x, epsilon) @ p["embed"]["embedding"].T)
    return np.stack(out)


def bert(params, tokens, types, mask, places, *, heads, epsilon):
    """Hidden states of BERT; `places` are the rows of the positions."""
    p = double(params)
    out = []
    for sequence, kinds, seen, rows in zip(
        *(np.asarray(a) for a in (tokens, types, mask, places)), strict=True
    ):
        x = (
            p["embed"]["embedding"][sequence]
            + p["positions"]["embedding"][rows]
            + p["types"]["embedding"][kinds]
        )
        x = layer_norm(p["embed_norm"], x, epsilon)
        for b in blocks(p):
            y = attention(b["attention"], x, heads, causal=False, mask=seen)
            x = layer_norm(b["norm_0"], x + y, epsilon)
            y = affine(b["mlp"]["down"], gelu(affine(b["mlp"]["up"], x)))
            x = layer_norm(b["norm_1"], x + y, epsilon)
        out.append(x)
    return np.stack(out)
