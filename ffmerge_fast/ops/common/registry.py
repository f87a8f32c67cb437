"""The one `torch.library` of the package: every op is defined, implemented and given a fake here."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("ffmerge", "DEF")


def define_op(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Register `ffmerge::<schema>` and return the callable op.

    Ops are private (leading underscore) because they know no autograd: a `torch.autograd.Function` goes around them.
    Define/impl costs 5-10 µs a call, `torch.library.custom_op` 10-20 µs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffmerge::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ffmerge, name).default
