"""Recover quality layer by layer: train the shared FFNs on their layers' own inputs, without the rest of the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.blocks import at_least_float32
from ...models.ffn_weights import ffn_parameters, ffn_weights, private_weights
from ...models.forward import evaluating
from ...models.projections import own_parameters, private_parameters
from ...models.sublayers import FFNSublayer
from ...ops.shared_ffn.op import apply_ffn
from ...ops.shared_ffn.weights import FFNWeights
from ...support.distributed import gather, on_all_ranks, share_of_rank, sum_over_ranks, world_size
from ...support.errors import FFMergeError
from ...support.progress import progress
from ...support.tensors import not_inference
from ..groups import format_indices
from ..settings import JUDGES
from .attach import attach_, check_own
from .deltas import Delta, Deltas, compute, nearest_deltas, same_on_all_ranks, unfused
from .own_norms import own_norms
from .recording import LayerData, groups_to_recover, record, stream_weights
from .reports import DistillGroup, DistillReport
from .rounds import Replay

_CHECKS = 20  # how often in a training the held-out tokens are judged
_WARMUP = 0.05  # share of the steps


@not_inference
def local_distill_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    steps: int = 400,
    lr: float = 1e-3,
    batch_tokens: int = 512,
    max_tokens: int = 20_000,
    seed: int = 0,
    delta_rank: int = 0,
    norms: bool = True,
    judge: str | None = None,
) -> DistillReport:
    """Train the shared FFN of every merged group, in place, to give what its layers gave in the original model.

    Minimised is  Σ_i w_i ‖FFN_shared(x_i) − y_i‖²  over the group's layers i and the calibration tokens, where x_i and
    y_i are the input and output of layer i's own FFN in the *original* model, and w_i is 1 / the variance of the stream
    after block i (as in `refit_`, which solves the same problem for W_down and b_down alone; as a start it helped where
    half of a GPT-2's FFNs were merged, and did harm where all were).
    All weights and biases of the FFN are trained, by AdamW without decay, with a warm-up of 1/20 and then a linear
    decay to 0. One forward pass of the teacher; after it only the FFN runs, on the k inputs of the same tokens in one
    call of `ops.shared_ffn`. Narrow weights are trained as float32 and rounded once. Each layer's own norm before the
    FFN is trained along, its gain and bias, where nothing else takes what it gives.

    The weights of the best of 20 steps are kept, or those the model had: by the merged model's loss on every tenth
    batch, which is put aside, where these have labels (the local error goes on falling when the model's loss rises);
    else by the local error on the last tenth of the tokens.

    Neurons that layers have of their own (`refit_(private=...)`) are trained along.

    With `delta_rank` r every layer also gets low-rank deltas of its own, in each projection W_i = W + A_i B_i (A_i of r
    columns, B_i of r rows; never multiplied out) and b_i = b + c_i where there is a bias. At first A_i B_i is the
    residual W_i − W of the original weights, cut to rank r by an SVD weighted by the second moments of the projection's
    inputs; then both are trained along with W. They are parameters of the model, saved with it, and `expand_` folds
    them into full weights. Of rank min(d_model, d_ff) they give the original layers back.

    Memory: 2 · max_tokens · d_model numbers of the model's dtype per merged layer, and the batches that are used. In a
    `torch.distributed` job each rank gives its own batches and its share of `max_tokens` and `batch_tokens`; gradients
    and errors are summed over the ranks, all get the same weights, and an error on one makes all raise.

    Args:
        model: the merged model, plain or after `refit_`. All other weights, the tie, modes and dtypes stay.
        teacher: the original model, unmerged: a copy made before `merge_`, or loaded again.
        batches: calibration data, as for `collect`; padding does not count, labels are not needed.
        steps: of each group.
        lr: the largest; 1e-3 suits FFNs of width 512, wider ones want less.
        batch_tokens: tokens of one step, from each of the group's layers.
        max_tokens: stop after exactly this many tokens; encoder and decoder count separately.
        seed: of the order of the tokens.
        norms: train the layers' own norms, too.
        judge: "loss" or "error", what the best step is kept by; None: the loss where batches have labels.
        delta_rank: 0 (no deltas) to min(d_model, d_ff). Each projection of a layer then has r · (inputs + outputs)
            parameters of its own, and biases of its own.

    Raises:
        FFMergeError: bad arguments; nothing is merged, or it has deltas already, or neurons of its layers' own and is
            to get deltas; deltas for quantised or wrapped
            projections; the teacher is merged or of another layout; too little data; features or errors that are not
            finite (names the group). The model is unchanged then.
    """
    with on_all_ranks("distill"):
        _check_arguments(steps, lr, batch_tokens, max_tokens, judge)
        groups = groups_to_recover(model, teacher, "distill", () if delta_rank else ("private_neurons",))
        check_own(model, groups, "delta_rank", delta_rank, "d_model, d_ff")
        replay, ffns = Replay(batches, hold_out=judge != "error"), [f for g in groups for f in g]
        first = next(iter(replay), None)
        found = own_norms(teacher, ffns, first) if norms and first is not None else {}
        data = record(teacher, ffns, replay, share_of_rank(max_tokens), "distill", found)
    sum_over_ranks([layer.moments for layer in data.values()])
    trainings = [_Training(model, ffns, data, found, batch_tokens, seed) for ffns in groups]
    if delta_rank:
        for training in trainings:
            training.start_deltas(teacher, delta_rank)
    loss = None
    if all(gather(replay.labelled if judge is None else judge == "loss")):
        loss = partial(_loss_as_trained, model, trainings, replay)
    with progress(total=steps * len(groups), desc="distill", unit="step") as bar:
        for training in trainings:
            for _ in training.run(steps, lr, loss):
                bar.update()
    for training in trainings:
        training.write_()
    if delta_rank:
        deltas = {key: deltas for training in trainings for key, deltas in training.deltas().items()}
        attach_(model, groups, {"delta_rank": delta_rank}, deltas)
    return DistillReport([training.report() for training in trainings])


@torch.no_grad()
def _loss_as_trained(model: nn.Module, trainings: Sequence[_Training], held: Replay) -> float:
    """The merged model's loss on the batches put aside, with what every group has been trained to so far."""
    with on_all_ranks("distill"), evaluating(model), contextlib.ExitStack() as context:
        for training in trainings:
            context.enter_context(training.in_place())
        score = held.loss(model)
    return sum(gather(score)) / world_size()


class _Training:
    """Training of one group's shared FFN, on copies of its parameters.

    Args:
        ffns: the group's layers.
        data: of every layer; the moments are those of all ranks.
        norms: {FFN key: path of the layer's own norm}, to be trained along; the layer's x goes into it.
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: Sequence[FFNSublayer],
        data: Mapping[str, LayerData],
        norms: Mapping[str, str],
        batch_tokens: int,
        seed: int,
    ):
        self._model, self._ffns, self._layers = model, ffns, [data[f.key] for f in ffns]
        self._norms = [model.get_submodule(norms[f.key]) if f.key in norms else None for f in ffns]
        of_norms = [p for norm in self._norms if norm is not None for p in norm.parameters()]
        self._with_neurons = ffns if private_parameters(model.get_submodule(ffns[0].down_path)) else []
        of_neurons = [
            p
            for f in self._with_neurons
            for path in f.projections.values()
            for p in own_parameters(model.get_submodule(path))
        ]
        self._parameters = ffn_parameters(model, ffns[0]) + of_norms + of_neurons
        self._copies = [at_least_float32(p.detach()).clone().requires_grad_() for p in self._parameters]
        self._replaced = {id(p): copy for p, copy in zip(self._parameters, self._copies, strict=True)}
        self._split(batch_tokens, seed)
        variances = torch.stack([layer.variance.cpu() for layer in self._layers])
        self._error_weights = stream_weights(variances).tolist()  # of each layer
        self._deltas: list[Deltas] = []  # of each layer
        self._trained = list(self._copies)
        self._kept: list[Tensor] = []  # their values at the best step
        self._history: list[tuple[int, float]] = []
        self._losses: list[tuple[int, float]] = []
        self._best = 0
        self._total = self._variance()
        self._before: float | None = None  # the share missed without deltas

    def _split(self, batch_tokens: int, seed: int) -> None:
        """This rank's tokens to train on, and to judge by; and how many of a step's tokens it takes."""
        here = len(self._layers[0].x)
        held_out = -(-here // 10)
        self._train, self._held_out = here - held_out, slice(here - held_out, here)
        counts = torch.tensor([self._train, held_out], device=self._copies[0].device)
        everywhere, judged = sum_over_ranks([counts])[0].tolist()
        if everywhere < 2 or judged < 2:
            raise FFMergeError(
                f"distill: the {self._ffns[0].stack} saw {everywhere + judged} tokens, wanted at least 20; give more "
                "calibration data"
            )
        self._batch = min(self._train, math.ceil(batch_tokens * self._train / everywhere))
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)

    def start_deltas(self, teacher: nn.Module, rank: int) -> None:
        """Give every layer the deltas that bring it closest to its original; they are trained, too."""
        self._before = self._share(0)
        ours = self._weights()
        for number, (member, layer) in enumerate(zip(self._ffns, self._layers, strict=True)):
            x = self._input(number, layer.x[: self._train]).detach()
            first = nearest_deltas(member, ffn_weights(teacher, member), ours, x, rank)
            like = self._copies[0]
            self._deltas.append({n: Delta(*(_leaf(t, like) for t in d)) for n, d in same_on_all_ranks(first).items()})
        self._trained += [t for deltas in self._deltas for delta in deltas.values() for t in delta if t is not None]

    def run(self, steps: int, lr: float, loss: Callable[[], float] | None) -> Iterator[int]:
        """Train; yields the number of each step done.

        Args:
            loss: of the model with what has been trained, to choose the best step by; None: by the held-out error.
        """
        optimizer = torch.optim.AdamW(self._trained, lr=lr, weight_decay=0.0)
        self._judge(0, loss)
        every = max(1, steps // _CHECKS)
        for step in range(1, steps + 1):
            optimizer.param_groups[0]["lr"] = lr * _schedule(step, steps)
            self._set_gradients()
            optimizer.step()
            if step % every == 0 or step == steps:
                self._judge(step, loss)
            if step == steps:
                self._take_best_()
            yield step

    @torch.no_grad()
    def _take_best_(self) -> None:
        for tensor, kept in zip(self._trained, self._kept, strict=True):
            tensor.copy_(kept)

    @torch.no_grad()
    def write_(self) -> None:
        """Give the model the best weights; rounded once. The weights it has are left alone where they are best."""
        if self._best:
            for parameter, kept in zip(self._parameters, self._kept, strict=False):  # the deltas' come after
                parameter.copy_(kept)

    @torch.no_grad()
    def deltas(self) -> dict[str, Deltas]:
        """The best deltas, by the layers' keys."""
        return {f.key: deltas for f, deltas in zip(self._ffns, self._deltas, strict=True)}

    def report(self) -> DistillGroup:
        layers = tuple(f.index for f in self._ffns)
        shares = dict(self._history)
        before = shares[0] if self._before is None else self._before
        rank = self._deltas[0]["down"].a.shape[1] if self._deltas else 0
        extra = sum(t.numel() for t in self._trained[len(self._copies) :])
        stack, history = self._ffns[0].stack, list(self._history)
        return DistillGroup(stack, layers, before, shares[self._best], self._best, history, rank, extra, self._losses)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's layers give what they would with the weights as they are trained now."""
        handles, now = [], []

        def begin(number: int, _: nn.Module, args: tuple[Any, ...]) -> None:
            now[:] = [number, None]

        def keep(of_norm: bool, _: nn.Module, args: tuple[Any, ...]) -> None:
            if now and of_norm == (self._norms[now[0]] is not None):
                now[1] = args[0]

        def replace(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if not now:  # called outside of the group's blocks
                return None
            number, x = now
            now.clear()
            return self._output(number, x.flatten(0, -2)).view(y.shape).to(y.dtype)

        for number, (ffn, norm) in enumerate(zip(self._ffns, self._norms, strict=True)):
            block = self._model.get_submodule(ffn.path)
            handles.append(block.register_forward_pre_hook(partial(begin, number)))
            if norm is not None:
                handles.append(norm.register_forward_pre_hook(partial(keep, True)))
        for module in self._distinct(f.up_path for f in self._ffns):
            handles.append(module.register_forward_pre_hook(partial(keep, False)))
        for module in self._distinct(f.down_path for f in self._ffns):
            handles.append(module.register_forward_hook(replace))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _distinct(self, paths: Iterable[str]) -> Iterable[nn.Module]:
        return {id(module): module for module in map(self._model.get_submodule, paths)}.values()

    def _set_gradients(self) -> None:
        """Gradients of the mean weighted error of one step's tokens, of all ranks."""
        with on_all_ranks("distill"), torch.enable_grad():
            tokens = self._next_tokens()
            loss = self._error(tokens)
            gradients = torch.autograd.grad(loss, self._trained)
        count = torch.tensor(float(len(tokens)), device=gradients[0].device)
        *gradients, count = sum_over_ranks([*gradients, count])
        for tensor, gradient in zip(self._trained, gradients, strict=True):
            tensor.grad = gradient.div_(count * self._ffns[0].d_model)

    def _next_tokens(self) -> Tensor:
        """Indices of this rank's next tokens; every token once before any comes again."""
        if len(self._order) < self._batch:
            self._order = torch.randperm(self._train, generator=self._generator)
        tokens, self._order = self._order[: self._batch], self._order[self._batch :]
        return tokens.to(self._layers[0].x.device)

    def _error(self, tokens: Tensor | slice) -> Tensor:
        """Σ w ‖FFN(x) − y‖² over the layers and these tokens."""
        like = self._copies[0]
        inputs = {i: self._input(i, layer.x[tokens]) for i, layer in enumerate(self._layers)}
        outputs = self._outputs(inputs)
        errors = [
            w * (output - layer.y[tokens].to(like)).square().sum()
            for w, output, layer in zip(self._error_weights, outputs, self._layers, strict=True)
        ]
        return torch.stack(errors).sum()

    def _input(self, number: int, x: Tensor) -> Tensor:
        """What a layer's FFN is given, [tokens, d_model], for what was recorded, by the norm as it is trained."""
        norm, x = self._norms[number], x.to(self._copies[0])
        if norm is None:
            return x
        own = {name: self._replaced[id(p)] for name, p in norm.named_parameters()}
        return torch.func.functional_call(norm, own, x)

    def _output(self, number: int, x: Tensor) -> Tensor:
        """What one layer gives for what goes into its norm, if that is trained, or into its FFN."""
        return self._outputs({number: self._input(number, x)})[0]

    def _outputs(self, inputs: Mapping[int, Tensor]) -> list[Tensor]:
        """What layers' FFNs give for their inputs."""
        weights, activation = self._weights(), self._ffns[0].activation
        if self._deltas:
            deltas = {i: unfused(self._deltas[i]) if self._ffns[0].fused else self._deltas[i] for i in inputs}
            return [compute(x, weights, deltas[i], activation) for i, x in inputs.items()]
        # there is no other layer's memory to save
        outputs = apply_ffn(list(inputs.values()), weights, activation, recompute="none")
        if not self._with_neurons:
            return outputs
        own = [apply_ffn([x], self._neurons(i), activation, recompute="none")[0] for i, x in inputs.items()]
        return [shared + mine for shared, mine in zip(outputs, own, strict=True)]

    def _neurons(self, number: int) -> FFNWeights:
        """A layer's own neurons as an FFN, and its own b_down, as they are trained."""
        return private_weights(self._model, self._ffns[number], self._replaced)

    def _weights(self) -> FFNWeights:
        """The shared FFN's, as they are trained."""
        return ffn_weights(self._model, self._ffns[0], self._replaced)

    def _judge(self, step: int, loss: Callable[[], float] | None) -> None:
        """Note the error on the held-out tokens, or the model's loss, and keep the weights if it is the smallest."""
        self._history.append((step, self._share(step)))
        if loss is not None:
            self._losses.append((step, loss()))
        scores = self._losses or self._history
        if step == 0 or scores[-1][1] < dict(scores)[self._best]:
            self._best = step
            self._kept = [tensor.detach().clone() for tensor in self._trained]

    @torch.no_grad()
    def _share(self, step: int) -> float:
        """The error on the held-out tokens of all ranks, as a share of their variance."""
        with on_all_ranks("distill"):
            error = self._error(self._held_out).double()
        share = sum_over_ranks([error])[0].item() / self._total
        if not math.isfinite(share):
            raise FFMergeError(
                f"distill: the error of {self._name} is {share} at step {step}"
                + ("; try a smaller lr=" if step else ": its inputs or outputs are not finite")
            )
        return share

    def _variance(self) -> float:
        """Σ w ‖y − mean y‖² over the layers and the held-out tokens of all ranks."""
        total = 0.0
        for w, layer in zip(self._error_weights, self._layers, strict=True):
            y = layer.y[self._held_out].double()
            moments = torch.stack([torch.ones_like(y).sum(0), y.sum(0), y.square().sum(0)])
            count, first, second = sum_over_ranks([moments])[0]
            total += w * (second - first.square() / count).sum().item()
        return max(total, torch.finfo(torch.float32).tiny)

    @property
    def _name(self) -> str:
        return f"{self._ffns[0].stack} {format_indices([f.index for f in self._ffns])}"


def _leaf(value: Tensor | None, like: Tensor) -> Tensor | None:
    """A tensor to train, of the dtype and device of another."""
    return None if value is None else value.detach().to(like).contiguous().requires_grad_()


def _schedule(step: int, steps: int) -> float:
    """Share of the largest learning rate in update `step`, from 1: a short rise, then in a straight line to 0."""
    warmup = _WARMUP * steps
    return min(1.0, step / max(1.0, warmup), (steps - step + 1) / (steps - warmup))


def _check_arguments(steps: int, lr: float, batch_tokens: int, max_tokens: int, judge: str | None) -> None:
    if judge not in (None, *JUDGES):
        raise FFMergeError(f"judge: got {judge!r}, wanted one of {', '.join(JUDGES)}, or None")
    if steps < 1:
        raise FFMergeError(f"steps: got {steps}, wanted at least 1 (about 400 is usual)")
    if not (lr > 0 and math.isfinite(lr)):
        raise FFMergeError(f"lr: got {lr}, wanted a positive number (1e-3 is usual)")
    if batch_tokens < 1:
        raise FFMergeError(f"batch_tokens: got {batch_tokens}, wanted at least 1 (about 500 is usual)")
    if max_tokens < 20:
        raise FFMergeError(f"max_tokens: got {max_tokens}, wanted at least 20 (about 20,000 is usual)")
