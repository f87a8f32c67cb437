"""The output folder of a training run: log, checkpoints, best weights, and going on where a killed run stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ...support import distributed
from ...support.digests import content_hash
from ...support.errors import FFMergeError
from ...support.files import json_text, write_text
from ...support.resume import Signature, in_use
from ...support.tensors import is_usable
from . import state as training_state
from .state import BEST, CHECKPOINT

_LOG = "log.jsonl"


class RunFolder:
    """Keeps a run's state in `root`, or only the best weights in memory if `root` is None. Rank 0 alone writes.

    Args:
        root: the output folder.
        signature: what must be the same when the run is resumed; JSON values.
        higher_is_better: for `offer`.
        keep_best: keep the best weights even without a folder.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        signature: Mapping[str, Any],
        higher_is_better: bool = False,
        keep_best: bool = False,
    ):
        self.root = Path(root) if root is not None else None
        self.signature = Signature(signature)
        self.run = content_hash(self.signature)
        self.higher_is_better, self.keep_best = higher_is_better, keep_best
        self.best_metric: float | None = None
        self.best_step: int | None = None
        self.last_saved: int | None = None
        self.history: list[dict[str, Any]] = []
        self._best_weights: dict[str, Tensor] = {}
        self._context = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        """Make the folder and keep other processes from it.

        Raises:
            FFMergeError: it cannot be written, or is in use.
        """
        if self.root is not None:
            distributed.on_rank_zero(self._make)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.close()

    def open(
        self, model: nn.Module, resume: bool, fresh: bool, masters: Mapping[str, torch.dtype] = MappingProxyType({})
    ) -> Path | None:
        """The checkpoint to resume from, if there is one; with `fresh` what an earlier run left is removed instead.

        Args:
            model: as it was when the run began, or with the weights of the checkpoint or the best ones.
            masters: {name: dtype} of weights that were rounded to it since.

        Raises:
            FFMergeError: the folder holds checkpoints and not `resume`; or they are of another run.
        """
        if self.root is None:
            return None
        if fresh:
            distributed.on_rank_zero(self._clear)
        checkpoints = training_state.folders(self.root, CHECKPOINT)
        if not checkpoints:
            return None
        last, folder = max(checkpoints.items())
        if not resume:
            raise FFMergeError(
                f"output_dir: {self.root} holds {folder.name} of an earlier run; give another folder, or resume=True"
            )
        state = training_state.read_state(folder)
        self._check(state, folder, model, masters)
        self.last_saved, self.run = last, state.get("run", self.run)
        return folder

    def load_(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Set model, optimiser, random states, history and best metric to a checkpoint's; returns its JSON part."""
        training_state.load_weights_(folder, model, self.run)
        training_state.load_optimizer_(folder, model, optimizer, self.run)
        training_state.load_random_states(folder, distributed.rank(), self.run)
        state = training_state.read_state(folder)
        self.best_metric, self.best_step = state["best_metric"], state["best_step"]
        self.history = [row for row in self._read_log() if row["step"] <= state["step"]]
        distributed.on_rank_zero(self._rewrite_log)
        distributed.on_rank_zero(lambda: self._prune(state))  # a killed run may not have come to it
        return state

    def log(self, row: dict[str, Any]) -> None:
        """Add a row to the history and to log.jsonl."""
        self.history.append(row)
        if self.root is not None and distributed.rank() == 0:
            try:
                with open(self.root / _LOG, "a", encoding="utf-8") as file:
                    file.write(json_text(row) + "\n")
            except OSError as error:
                raise FFMergeError(f"output_dir: {self.root / _LOG} cannot be written: {error.strerror}") from error

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write a checkpoint of `state["step"]` and remove older ones; every rank calls this."""
        if self.root is None or self.last_saved == state["step"]:
            return
        weights = training_state.gathered(training_state.model_tensors(model))
        moments = training_state.gathered(training_state.optimizer_tensors(model, optimizer))
        rng = distributed.gather_tensors(training_state.random_states())
        state = state | {"best_metric": self.best_metric, "best_step": self.best_step, "settings": self.signature}
        state = state | {"run": self.run}
        distributed.on_rank_zero(lambda: self._write(weights, moments, rng, state))
        self.last_saved = state["step"]

    def offer(self, model: nn.Module, step: int, metric: float) -> bool:
        """Keep the model's weights if `metric` is the best so far; NaN and Inf never are. Every rank calls this."""
        better = self.best_metric is None or (
            metric > self.best_metric if self.higher_is_better else metric < self.best_metric
        )
        if not is_usable(metric, f"evaluate: the metric at step {step}") or not better:
            return False
        self.best_metric, self.best_step = metric, step
        if self.root is not None:
            weights = training_state.gathered(training_state.model_tensors(model))
            distributed.on_rank_zero(lambda: training_state.save_best(self.root, step, weights, self.run))
        elif self.keep_best:
            self._best_weights = {name: t.detach().clone() for name, t in training_state.model_tensors(model).items()}
        return True

    def restore_best_(self, model: nn.Module) -> None:
        """Give the model its best weights back, if any were kept."""
        if self.best_step is None:
            return
        if self.root is not None:
            training_state.load_weights_(self.root / f"{BEST}-{self.best_step}", model, self.run)
            return
        with torch.no_grad():
            for name, tensor in training_state.model_tensors(model).items():
                tensor.copy_(self._best_weights[name])

    def last_good(self) -> str:
        """Where the last state on disk is, for an error message."""
        if self.root is None:
            return "nothing was saved, output_dir is not given"
        if self.last_saved is None:
            return f"nothing was saved in {self.root} yet"
        return f"the last good state is {self.root / f'{CHECKPOINT}-{self.last_saved}'}"

    def _make(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FFMergeError(f"output_dir: {self.root} cannot be made: {error.strerror}") from error
        if not os.access(self.root, os.W_OK):
            raise FFMergeError(f"output_dir: {self.root} cannot be written: no permission")
        self._context.enter_context(in_use(self.root, "output_dir"))

    def _clear(self) -> None:
        for kind in (CHECKPOINT, BEST):
            training_state.prune(self.root, kind, keep=[])
        (self.root / _LOG).unlink(missing_ok=True)

    def _check(
        self, state: dict[str, Any], checkpoint: Path, model: nn.Module, masters: Mapping[str, torch.dtype]
    ) -> None:
        now, kept = self.signature, state["settings"]
        if kept.get("weights", now.get("weights")) != now.get("weights"):  # the trained ones do as well
            tensors = training_state.gathered(training_state.model_tensors(model))
            best = self.root / f"{BEST}-{state['best_step']}"
            if any(training_state.holds(folder, tensors, masters) for folder in (checkpoint, best) if folder.exists()):
                now["weights"] = kept["weights"]
        now.check(kept, f"resume: {self.root}")

    def _write(self, weights: dict, moments: dict, rng: dict, state: dict[str, Any]) -> None:
        training_state.save_checkpoint(self.root, weights, moments, rng, state)
        self._prune(state)

    def _prune(self, state: dict[str, Any]) -> None:
        training_state.prune(self.root, CHECKPOINT, keep=[state["step"]])
        training_state.prune(self.root, BEST, keep=[state["best_step"]])

    def _read_log(self) -> list[dict[str, Any]]:
        """The rows that are whole: a killed run may have left part of one."""
        if not (self.root / _LOG).exists():
            return []
        rows = []
        for line in (self.root / _LOG).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]

    def _rewrite_log(self) -> None:
        write_text(self.root / _LOG, "".join(json_text(row) + "\n" for row in self.history))
