"""Slow, obvious float64 versions of the formulas; numpy only, never bnfix."""

import numpy as np


def population(running, groups):
    """Pooled moments (C,) of the channel groups of (mean, var)."""
    mean, var = (np.asarray(m, np.float64) for m in running)
    out_mean, out_var = np.empty_like(mean), np.empty_like(var)
    for group in np.split(np.arange(len(mean)), groups):
        out_mean[group] = mean[group].mean()
        out_var[group] = (var[group] + mean[group] ** 2).mean() - mean[group].mean() ** 2
    return out_mean, out_var


def evaluate(
    x,
    gamma,
    beta,
    running,
    *,
    groups,
    example_weight,
    eps,
    batch_weight=0.0,
    median=False,
    valid=None,
):  # fmt: skip
    """Inference, one example and one channel group at a time, from raw moments."""
    x = np.asarray(x, np.float64)
    n, c = x.shape[:2]
    a, b = (
        np.broadcast_to(np.asarray(w, np.float64), (c,)) for w in (example_weight, batch_weight)
    )
    pop_mean, pop_var = population(running, groups)
    y = np.empty_like(x)
    for group in np.split(np.arange(c), groups):
        blocks = [x[i, group] if valid is None else x[i, group][:, valid[i]] for i in range(n)]
        batch_mean, batch_var = batch_moments(blocks, median)
        for i, block in enumerate(blocks):
            for ch in group:
                rest = 1 - a[ch] - b[ch]
                m1 = rest * pop_mean[ch] + b[ch] * batch_mean + a[ch] * block.mean()
                m2 = rest * (pop_var[ch] + pop_mean[ch] ** 2) + a[ch] * (block**2).mean()
                m2 += b[ch] * (batch_var + batch_mean**2)
                y[i, ch] = gamma[ch] * (x[i, ch] - m1) / np.sqrt(m2 - m1**2 + eps) + beta[ch]
    return y


def batch_moments(blocks, median):
    """Mean and variance of all values, or by medians over the examples' moments."""
    if not median:
        values = np.concatenate([block.ravel() for block in blocks])
        return np.mean(values), np.var(values)
    means, variances = ([f(block) for block in blocks] for f in (np.mean, np.var))
    centre = np.median(means)
    spread = 1.4826 * np.median(np.abs(np.asarray(means) - centre))
    return centre, np.median(variances) + spread**2


def train(x, gamma, beta, *, groups, ghost_size, eps):
    """Training output: every (run, channel group) by its own two-pass moments."""
    x = np.asarray(x, np.float64)
    n, c = x.shape[:2]
    y = np.empty_like(x)
    runs = 1 if ghost_size is None else -(-n // ghost_size)
    for run in np.array_split(np.arange(n), runs):
        for group in np.split(np.arange(c), groups):
            block = x[np.ix_(run, group)]
            y[np.ix_(run, group)] = (block - block.mean()) / np.sqrt(block.var() + eps)
    shape = (1, c) + (1,) * (x.ndim - 2)
    return y * np.reshape(gamma, shape) + np.reshape(beta, shape)


def channel_moments(x):
    """Mean and biased variance of every channel of (N, C, ...)."""
    x = np.asarray(x, np.float64)
    flat = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
    return flat.mean(1), flat.var(1)


def gated(x, gamma, beta, gates, *, normalize, valid=None):
    """Gates of Representative Batch Norm, as its authors write them, around any normalization."""
    x = np.asarray(x, np.float64).copy()
    centring, scaling, bias = (np.asarray(row, np.float64) for row in gates)

    def sigmoid(t):
        return 1 / (1 + np.exp(-t))

    def mean(values, i, ch):
        return values[i, ch].mean() if valid is None else values[i, ch][valid[i]].mean()

    pairs = [(i, ch) for i in range(x.shape[0]) for ch in range(x.shape[1])]
    for i, ch in pairs:
        x[i, ch] += centring[ch] * mean(x, i, ch)
    z = normalize(x)
    y = np.empty_like(z)
    for i, ch in pairs:
        theirs = gamma[ch] / sigmoid(bias[ch])
        gate = sigmoid(scaling[ch] * mean(z, i, ch) + bias[ch])
        y[i, ch] = theirs * gate * z[i, ch] + beta[ch]
    return y
