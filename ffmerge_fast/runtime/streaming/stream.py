"""Run a model that is larger than its device: its blocks' weights come from host memory or disk when they are used."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ...models.elsewhere import elsewhere
from ...models.streamed import HANDLE, refusal, refuse_streamed
from ...support.errors import FFMergeError
from ...support.sizes import parse_bytes
from .loader import Loader
from .plan import Steps, Weight, check_budget, choose_resident, total
from .schedule import ParameterSlots, StreamSchedule
from .source import PLACES, Source


def stream_(
    model: nn.Module,
    device: str | torch.device = "cuda",
    weights: str = "host",
    budget: int | str = "20GiB",
    folder: str | os.PathLike | None = None,
) -> WeightStream:
    """Keep the blocks' weights elsewhere and load each block's, on `device`, while the block before it runs.

    A merged FFN is read once per pass: before the first block that uses it; it is kept until the last. Weights outside
    of the blocks stay on the device, and so do as many of the blocks' as the budget allows. Calls and `generate` give
    what the model gives without streaming. Inference only. On the CPU, "host" copies from memory to memory.

    Args:
        model: of any family of `find_ffns`, merged or not; in evaluation mode. Parameters may be on "meta" if their
            values are in the model's folder (buffers may not).
        device: "cpu", "cuda" or "cuda:<n>", where the model then runs.
        weights: "host": in host memory, pinned for CUDA. "disk": in safetensors files; read in place from the model's
            own folder where that holds the same values. The rest is written to a temporary file (in TMPDIR).
        budget: most bytes of weights on the device at once: a whole number, "20GiB", "500MB".
        folder: of safetensors files with the model's weights; by default the one it was loaded from.

    Returns:
        A handle: `with ff.stream_(model, ...):` ends the streaming, as `unstream_(model)` does.

    Raises:
        FFMergeError: unknown device or place; a budget too small for one layer (with the bytes needed); weights on
            "meta" that no file holds; a file that cannot be written. Nothing is changed then. Later, from a forward
            pass: a file that is gone or changed, weights that were changed, a pass with gradients.
    """
    refuse_streamed(model, "stream_")
    if weights not in PLACES:
        raise FFMergeError(f"weights: got {weights!r}, wanted 'host' or 'disk'")
    return WeightStream(model, _checked_device(device), weights, parse_bytes(budget, "budget"), folder)


def unstream_(model: nn.Module) -> nn.Module:
    """Undo `stream_`: all weights are where they were, with their values, and no hook is left.

    Raises:
        FFMergeError: the model is not streamed; a file is gone or was changed (the model stays streamed then).
    """
    stream = getattr(model, HANDLE, None)
    if stream is None:
        raise FFMergeError("unstream_: this model is not streamed; wanted one that stream_ was called on")
    stream.close()
    return model


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise FFMergeError(f"device: got {device!r}, wanted 'cpu', 'cuda' or 'cuda:<n>'") from error
    if found.type not in ("cpu", "cuda"):
        raise FFMergeError(f"device: got {device!r}, wanted 'cpu', 'cuda' or 'cuda:<n>'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise FFMergeError(f"device: got {device!r}, but there are {torch.cuda.device_count()} CUDA devices here")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


class WeightStream:
    """A streamed model's handle, see `stream_`; a context manager.

    Attributes:
        device: where the model runs.
        fixed_bytes: of weights that always lie on the device.
        streamed_bytes: of weights that are read in every pass.
    """

    def __init__(self, model: nn.Module, device: torch.device, place: str, budget: int, folder):
        steps = Steps.of(model)
        blocks, parcels, rest, fixed, following = steps.blocks, steps.parcels, steps.rest, steps.fixed, steps.following
        check_budget(budget, fixed, parcels, following)
        if meta := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
            raise FFMergeError(f"stream_: buffer {meta[0]} is on meta, wanted its values; build buffers on the CPU")
        resident = choose_resident(parcels, following, budget - fixed, often=steps.often)
        self._parcels = [parcel for parcel in parcels if parcel not in resident]
        self._fixed = [*rest, *(weight for parcel in resident for weight in parcel.weights)]
        self.fixed_bytes, self.streamed_bytes = fixed + total(resident), total(self._parcels)
        self._model, self.device = model, device
        self._away: set[Weight] = set()  # to be brought back at the end
        self._undo = contextlib.ExitStack()
        folder = folder or getattr(model, "name_or_path", None)
        self._source = Source(self._fixed, [*self._weights()], place, device, folder, elsewhere(model))
        self._undo.callback(self._source.close)
        self._loader, self._places = Loader(self._source, device), ParameterSlots(device)
        self._passes = StreamSchedule(self._parcels, following, budget - self.fixed_bytes, self._loader, self._places)
        try:
            self._take_over(place, blocks)
            self._of_parameter = {p: weight for weight in self._weights() for p in weight.parameters}
        except BaseException:
            self.close()
            raise

    @property
    def read_bytes(self) -> int:
        """Read so far."""
        return self._loader.read_bytes

    def read(self, parameter: Tensor) -> Tensor:
        """The values of one of the model's parameters; on the host, where they are streamed."""
        weight = self._of_parameter.get(parameter)
        return parameter.detach() if weight is None else self._source.value(weight)

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, *exception) -> None:
        if getattr(self._model, HANDLE, None) is self:
            self.close()

    def __reduce_ex__(self, protocol):  # a copy or pickle of the model would lack weights
        raise refusal("copy")

    def close(self) -> None:
        """What `unstream_` does."""
        values = {w: self._source.value(w) for w in self._weights() if w in self._away}
        self._loader.close()
        self._passes.forget()
        for weight, value in values.items():
            for parameter in weight.parameters:
                parameter.data = value
        self._undo.close()

    # -------------------------------------------------------------------------------------------------- start and end

    def _weights(self) -> Iterable[Weight]:
        return (weight for parcel in self._parcels for weight in parcel.weights)

    def _take_over(self, place: str, blocks: list[str]) -> None:
        setattr(self._model, HANDLE, self)
        self._undo.callback(delattr, self._model, HANDLE)
        for parameter in self._model.parameters():
            self._undo.callback(parameter.requires_grad_, parameter.requires_grad)
        for buffer in self._model.buffers():
            self._move(buffer, buffer.data.to(self.device))
        for weight in self._fixed:
            value = self._source.value(weight).to(self.device)
            self._leave_meta(weight, value)
            for parameter in weight.parameters:
                self._move(parameter, value)
        for weight in self._weights():
            self._send_away(weight)
        self._model.requires_grad_(False)
        for step, block in enumerate(blocks):
            module = self._model.get_submodule(block)
            self._hook(module.register_forward_pre_hook(partial(self._enter, step), with_kwargs=True, prepend=True))
        for module in self._model.modules():
            self._hook(module.register_state_dict_post_hook(partial(self._complete)))
            self._hook(module.register_load_state_dict_pre_hook(partial(self._refuse_load)))
        parameters = frozenset(map(id, self._model.parameters()))
        handle = register_optimizer_step_pre_hook(partial(_refuse_step, parameters))
        self._undo.callback(weakref.finalize(self, handle.remove))

    def _hook(self, handle) -> None:
        self._undo.callback(handle.remove)

    def _move(self, tensor: Tensor, value: Tensor) -> None:
        """Give a tensor that stays its place on the device; at the end it goes back."""
        origin = tensor.device
        if origin != value.device:
            tensor.data = value
            self._undo.callback(_move_back, tensor, origin)

    def _send_away(self, weight: Weight) -> None:
        origin, is_meta = weight.parameters[0].device, weight.is_meta
        self._source.keep(weight)
        self._leave_meta(weight, self._places.blank_like(weight.parameters[0]))
        if not is_meta:
            self._away.add(weight)
        for parameter in weight.parameters:
            if not is_meta and origin.type != "cpu":
                self._undo.callback(_move_back, parameter, origin)
        self._places.clear(weight)

    def _leave_meta(self, weight: Weight, value: Tensor) -> None:
        """Parameters on "meta" can get no data: others take their place, and give it back at the end."""
        if not weight.is_meta:
            return
        (old,) = weight.parameters
        new = nn.Parameter(value, requires_grad=False)
        for name in weight.names:
            path, _, attribute = name.rpartition(".")
            owner = self._model.get_submodule(path)
            owner.register_parameter(attribute, new)
            self._undo.callback(owner.register_parameter, attribute, old)
        weight.parameters = [new]

    # ------------------------------------------------------------------------------------------------- hooks and guards

    def _enter(self, step: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a block runs."""
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if torch.is_grad_enabled() and (self._model.training or any(value.requires_grad for value in inputs)):
            raise FFMergeError(
                "stream_: a streamed model does inference only; call model.eval(), or unstream_(model) to train it"
            )
        self._passes.enter(step)

    def _complete(self, module: nn.Module, state: dict, prefix: str, _metadata) -> None:
        """Put the real values into a state dict; one tensor for all names of a weight."""
        here = {id(parameter): name for name, parameter in module.named_parameters(recurse=False)}
        for weight in self._weights():
            for name in [here[id(p)] for p in weight.parameters if id(p) in here]:
                state[prefix + name] = self._source.value(weight)

    def _refuse_load(self, *_args) -> None:
        raise refusal("load_state_dict")


def _move_back(tensor: Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


def _refuse_step(parameters: frozenset[int], optimizer: torch.optim.Optimizer, *_args) -> None:
    if any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
        raise refusal("optimizer.step")
