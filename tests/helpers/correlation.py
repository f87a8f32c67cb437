"""Correlated features, their exact correlations, and how close a backend must come."""

import torch

import ffmerge_fast as ff


def tolerance(backend, dtype, tokens):
    """Of a correlation against float64: 1e-6; on AMX, features other than bfloat16 have 17 bits, averaged by tokens."""
    return 1e-6 if "amx" not in backend or dtype == torch.bfloat16 else max(1e-6, 4e-5 / tokens**0.5)


def features(tokens, width, seed, offset=0.0, mixed=8):
    """Correlated features: common factors (equal for all seeds) mixed by weights of this seed, std about 1."""
    factors = torch.randn(tokens, mixed, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    x = factors @ torch.randn(mixed, width, generator=g) / mixed**0.5 + 0.3 * torch.randn(tokens, width, generator=g)
    return x + offset * torch.randn(width, generator=g).sign()


def truth(a, b):
    """Pearson correlation in float64, 0 without variance."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    scale = a.square().sum(0).sqrt()[:, None] * b.square().sum(0).sqrt()
    return torch.where(scale > 0, a.T @ b / scale, 0)


def state_of(x, pairs=((0, 1),), **options):
    return ff.CorrelationState({key: value.shape[-1] for key, value in x.items()}, pairs, **options)


def correlate(x, splits=(), mask=None, **options):
    state = state_of(x, **options)
    bounds = [0, *splits, len(x[0])]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = None if mask is None else mask[start:stop]
        ff.ops.correlation_accumulate_(state, {key: value[start:stop] for key, value in x.items()}, part)
    return state
