"""Find out on random inputs whether `ops.shared_ffn` may stand for an FFN of somebody else's code, and how."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...models.projections import in_features, own_parameters
from ...models.sublayers import FFNSublayer
from ...ops.common.activations import FORWARD
from ...support.tensors import has_memory
from .forms import FFNInside, OpForm, WholeFFN, at, clear_hooks

_TOLERANCE = 1e-4  # of the largest output, between two float32 computations of the same
_LINEAR = ("Conv1D", "FalconLinear")  # transformers' own classes that multiply by `weight` and add `bias`


def host_path(ffn: FFNSublayer) -> str:
    """Path of the innermost module that holds all projections of an FFN."""
    paths = [path.split(".")[:-1] for path in (ffn.up_path, ffn.gate_path, ffn.down_path) if path]
    common = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def form_of(module: nn.Module, ffn: FFNSublayer, recompute: str) -> OpForm | str:
    """How the op can stand for the FFN in `module`, the module at `host_path(ffn)`; or why it cannot."""
    prefix = f"{host_path(ffn)}."
    up, gate, down = (path and path.removeprefix(prefix) for path in (ffn.up_path, ffn.gate_path, ffn.down_path))
    arguments = (up, gate, down, ffn.fused, ffn.activation, recompute)
    if ffn.activation not in FORWARD:
        return f"activation {ffn.activation!r}"
    for path in filter(None, (up, gate, down)):
        part = at(module, path)
        if own_parameters(part):
            return "its layer has low-rank deltas or neurons of its own"
        if type(part) is not nn.Linear and type(part).__name__ not in _LINEAR:
            return f"a projection is a {type(part).__name__}"
        if part.weight.is_meta:
            return "its weights are on the meta device: load them first"
        if not has_memory(part.weight):
            return f"its weights are quantised or sharded ({type(part.weight).__name__})"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")
        try:
            clone = _plain_copy(module)
        except Exception as error:  # quantised neighbours and the like
            return f"its layer cannot be copied in float32 ({type(error).__name__})"
        whole = WholeFFN(*arguments)
        reason = _try_whole(clone, whole)
        if reason is None:
            return whole
        if gate or ffn.fused:
            return reason
        inside = FFNInside(*arguments)
        return _try_inside(clone, inside) or inside


def _plain_copy(module: nn.Module) -> nn.Module:
    """On the CPU in float32, without hooks."""
    clone = copy.deepcopy(module).to("cpu", torch.float32)
    clear_hooks(clone)
    return clone


def _input(clone: nn.Module, form: OpForm) -> Tensor:
    width = in_features(at(clone, form.up))
    return torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _try_whole(clone: nn.Module, form: WholeFFN) -> str | None:
    """None if the module is an FFN: the form then knows its dropouts."""
    if any("." in path for path in form.projections):
        return "its projections are not its direct children"
    form.parts = {name: type(child) for name, child in clone._modules.items()}
    x = _input(clone, form)
    try:
        expected = clone.eval()(x)
    except Exception as error:  # whatever the forward of another library raises for a lone input
        return f"its forward does not take x alone ({type(error).__name__})"
    if not _equal(form.run(clone, x), expected):
        return "its forward does more than an FFN"
    _find_dropouts(clone.train(), form, lambda: not _equal(form.run(clone, x), clone(x)))
    for path, name in form.dropouts:
        if _is_last(path, clone, form, x):
            form.last_dropout = path
            form.dropouts = tuple(other for other in form.dropouts if other != (path, name))
            break
    return None


def _is_last(path: str, clone: nn.Module, form: WholeFFN, x: Tensor) -> bool:
    """Whether the child at `path` is dropout of the output: it has the same random numbers there."""
    dropout = clone._modules.get(path)
    if not isinstance(dropout, nn.Dropout):
        return False
    dropout.p = 0.5
    torch.manual_seed(0)
    expected = clone(x)
    torch.manual_seed(0)
    ours = dropout(form.run(clone, x))
    dropout.p = 0.0
    return _equal(ours, expected)


@torch.no_grad()
def _try_inside(clone: nn.Module, form: FFNInside) -> str | None:
    """None if the module's forward runs up, activation, dropout at most, and down: the form then knows where."""
    x, reached = _input(clone, form), []
    record = _Recorder(clone.eval(), form)
    try:
        arguments = _arguments(clone, x)
        expected = _first(clone(*arguments))
    except Exception as error:
        return f"its layer's forward does not run on random hidden states ({type(error).__name__}: {error})"
    reason = record.what_is_wrong()
    if reason:
        return reason
    form.act = record.act
    paths = (form.up, form.act, form.down)
    holders = (path.rpartition(".")[0] for path in paths)
    form.parts = {path: type(at(clone, path)) for path in (*paths, *holders) if path}

    def ffn(x: Tensor) -> Tensor:
        reached.append(x)
        return form.run(clone, x)

    try:
        ours = _first(form.twin(clone, ffn)(*arguments))
    except Exception as error:
        return f"its layer's forward needs more of the projections than their outputs ({type(error).__name__})"
    if len(reached) != 1 or not _equal(ours, expected):
        return "its layer's forward does more than an FFN with the projections"
    clone.train()
    _find_dropouts(clone, form, lambda: clone(*arguments) is None or not record.down_gets_the_activation())
    return None


def _arguments(module: nn.Module, x: Tensor) -> list:
    """With which its forward runs: hidden states, and what else it wants is None (masks), or the same (a residual)."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    others = len([p for p in parameters if p.default is p.empty and p.kind in kinds]) - 1
    try:
        module(x, *[None] * others)
        return [x] + [None] * others
    except Exception:
        if not others:
            raise
    module(x, *[x] * others)
    return [x] * (1 + others)


def _first(output: object) -> object:
    return output[0] if isinstance(output, tuple | list) else output


class _Recorder:
    """What passes between `up` and `down` in a forward."""

    def __init__(self, module: nn.Module, form: FFNInside):
        self.form = form
        self.calls: list[tuple[str, Tensor, Tensor]] = []  # path, input, output of modules that hold no others
        module.register_forward_pre_hook(lambda *_: self.calls.clear())
        for path, part in module.named_modules():
            if not part._modules:
                part.register_forward_hook(
                    lambda _, inputs, output, path=path: self.calls.append(
                        (path, inputs[0] if inputs else None, output)
                    )
                )

    def what_is_wrong(self) -> str | None:
        """None after a forward in which only the activation ran between up and down; `act` is then its path."""
        paths = [path for path, _, _ in self.calls]
        if paths.count(self.form.up) != 1 or paths.count(self.form.down) != 1:
            return "its layer's forward does not call each projection once"
        start, end = paths.index(self.form.up), paths.index(self.form.down)
        between, hidden = self.calls[start + 1 : end], self.calls[start][2]
        self.act = next((path for path, given, _ in between if given is hidden), None)
        if self.act is None:
            return "its activation is not a module that its layer's forward calls"
        if not self.down_gets_the_activation():
            return "its layer's forward does more than the activation between the projections"
        return None

    def down_gets_the_activation(self) -> bool:
        tensors = {path: (given, output) for path, given, output in self.calls}
        _, hidden = tensors[self.form.up]
        given, _ = tensors[self.form.down]
        return _equal(FORWARD[self.form.activation](hidden), given)


def _find_dropouts(clone: nn.Module, form: OpForm, differs: Callable[[], bool]) -> None:
    """Try every probability of a module in training on its own: does the FFN then compute something else?"""
    probabilities = list(_probabilities(clone))
    for path, name in probabilities:
        setattr(at(clone, path), name, 0.0)
    form.only_eval = differs()
    found = []
    for path, name in probabilities:
        setattr(at(clone, path), name, 0.5)
        if differs():
            found.append((path, name))
        setattr(at(clone, path), name, 0.0)
    form.dropouts = tuple(found)


def _probabilities(module: nn.Module) -> Iterator[tuple[str, str]]:
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            named = name == "p" if isinstance(part, nn.Dropout) else "dropout" in name
            if named and isinstance(value, float | int) and not isinstance(value, bool):
                yield path, name


def _equal(ours: Tensor, expected: object) -> bool:
    if not isinstance(expected, Tensor) or ours.shape != expected.shape:
        return False
    return bool((ours - expected).abs().max() <= _TOLERANCE * expected.abs().max())
