"""Run calibration batches through a model, with hooks on its modules, and know which tokens count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.elsewhere import needs_weights
from ..models.forward import evaluating, run, to_device, without_cache
from ..models.streamed import is_streamed
from ..models.sublayers import FFNSublayer
from ..support.distributed import world_size
from ..support.errors import FFMergeError
from ..support.progress import progress
from .padding import token_masks


class Passes:
    """Forward passes of a model in evaluation mode and without a key-value cache, with hooks on some of its modules.

    A context manager.

    Args:
        model: its modes, hooks and gradients are as before when the context ends.
        stacks: whose tokens are asked for.
    """

    def __init__(self, model: nn.Module, stacks: Iterable[str]):
        self.model, self._stacks = model, list(stacks)
        self._valid: dict[str, Tensor] = {}  # of this batch: tokens that are not padding, as far as it says
        self._context = contextlib.ExitStack()

    def __enter__(self):
        if not is_streamed(self.model):
            needs_weights(self.model, "calibration")
        for context in (evaluating(self.model), without_cache(self.model), _without_fast_path(), torch.no_grad()):
            self._context.enter_context(context)
        return self

    def __exit__(self, *exception):
        self._context.close()

    def on_input(self, path: str, receive: Callable[[Any], None]) -> None:
        """Call `receive(first argument)` before the module at `path` runs."""
        module = self.model.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda _, args: receive(args[0] if args else None))
        self._context.callback(handle.remove)

    def on_output(self, path: str, receive: Callable[[Any], Any]) -> None:
        """Call `receive(output)` after the module at `path` ran; what it returns, if anything, takes its place."""
        handle = self.model.get_submodule(path).register_forward_hook(lambda _, args, output: receive(output))
        self._context.callback(handle.remove)

    def valid(self, stack: str, tokens: int) -> Tensor | None:
        """Which of this batch's tokens are not padding, bool [tokens]; None where the batch does not say."""
        mask = self._valid.get(stack)
        if mask is not None and mask.numel() != tokens:
            raise FFMergeError(
                f"the {stack}'s attention_mask has shape {list(mask.shape)}, but its FFNs saw {tokens} tokens: wanted "
                "one value per token, [batch, length]"
            )
        return None if mask is None else mask.reshape(-1).bool()

    def finished(self) -> bool:
        """Whether no further batch is wanted."""
        return False

    def over(self, batches: Iterable[Any], name: str, skip: int = 0) -> Iterator[tuple[int, Any]]:
        """Run batches while they are wanted, with a progress bar; yields (number, batch) after each.

        Args:
            name: of the work, for the bar and the errors.
            skip: batches to leave out at the start.
        """
        check_batches(batches)
        number = -1
        with self._bar(name) as bar:
            for number, batch in enumerate(batches):
                if number < skip:
                    continue
                bar.update(self.take(batch, number))
                yield number, batch
                if self.finished():
                    break
        if number < 0 and world_size() == 1:  # other ranks may have data, and wait for this one
            raise FFMergeError(f"{name}: no calibration data: `batches` is empty")

    def take(self, batch: Any, number: int) -> int:
        """Run one batch; returns how far the bar moves."""
        batch = to_device(batch, self.model)
        self._valid = token_masks(batch, self.model, self._stacks)
        run(self.model, batch)
        return 1

    def _bar(self, name: str):
        return progress(desc=name, unit="batch")


def check_batches(batches: Any) -> None:
    """Raise FFMergeError for one batch where several are wanted."""
    if isinstance(batches, (Mapping, Tensor, str)):
        raise FFMergeError(f"batches: got one {type(batches).__name__}, wanted an iterable of them; give [batch]")


class FFNPasses(Passes):
    """Passes with hooks on some FFNs, until enough tokens are counted.

    A token counts unless it is padding, up to exactly `max_tokens` in each stack. A pass ends early once `saw` was
    called for every FFN.

    Args:
        ffns: the FFNs that must run in every batch.
        max_tokens: of this process, in each stack.
        counts: {stack: tokens} counted before.
    """

    def __init__(
        self, model: nn.Module, ffns: Sequence[FFNSublayer], max_tokens: int, counts: Mapping[str, int] | None = None
    ):
        self.max_tokens = max_tokens
        self.counts = dict.fromkeys((f.stack for f in ffns), 0) | dict(counts or {})
        super().__init__(model, self.counts)
        self._keys = {f.key for f in ffns}
        self._masks: dict[str, Tensor] = {}  # of this batch: tokens to count
        self._seen: set[str] = set()
        self._may_stop = may_stop(model)

    def saw(self, ffn: FFNSublayer) -> None:
        """Nothing more is wanted of this FFN in this batch; ends the pass after the last one."""
        self._seen.add(ffn.key)
        if self._seen == self._keys and self._may_stop:
            raise _AllSeen

    def mask(self, stack: str, tokens: int, device: torch.device) -> Tensor:
        """Which of this batch's tokens count, bool [tokens]: not padding, and not beyond max_tokens."""
        if stack not in self._masks:
            valid = self.valid(stack, tokens)
            valid = torch.ones(tokens, dtype=torch.bool) if valid is None else valid
            self._masks[stack] = (valid & (valid.cumsum(0) <= self.max_tokens - self.counts[stack])).to(device)
        return self._masks[stack]

    def finished(self) -> bool:
        """Whether every stack has counted its tokens."""
        return min(self.counts.values()) >= self.max_tokens

    def take(self, batch: Any, number: int) -> int:
        """Run one batch, up to the last FFN that is wanted; returns how many tokens were counted."""
        self._masks, self._seen = {}, set()
        before = min(self.counts.values())
        with contextlib.suppress(_AllSeen):
            super().take(batch, number)
        for stack in self.counts:
            if stack not in self._masks:
                raise FFMergeError(
                    f"batch {number}: the {stack} did not run; give inputs for it (labels, decoder_input_ids)"
                )
            self.counts[stack] += int(self._masks[stack].sum())
        return min(self.counts.values()) - before

    def _bar(self, name: str):
        return progress(total=self.max_tokens, desc=name, unit="tok")


class _AllSeen(Exception):
    """Ends a forward pass once every wanted FFN has run."""


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch's own encoder layers call their Linears, instead of one kernel that shows no features."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def may_stop(model: nn.Module) -> bool:
    """Whether nothing needs the forward pass to end the ordinary way (offloading hooks, sharded modules do)."""
    wrappers = ("FSDP", "DistributedDataParallel", "FullySharded")
    return not any(hasattr(m, "_hf_hook") or type(m).__name__.startswith(wrappers) for m in model.modules())
