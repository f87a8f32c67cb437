"""What the arguments of a command stand for: model, data, statistics, plan."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..support.errors import FFMergeError
from ..support.timing import timed
from .footprint import calibration_batch
from .needs import check_kind
from .results import Result

_LARGE = 1e9  # bytes of a model of which is said what it takes


class Inputs:
    """Each input is made when it is first asked for, and then kept.

    Attributes:
        seconds: {stage: how long it took} of what was computed.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.seconds: dict[str, float] = {}

    @cached_property
    def model(self) -> Any:
        """The model, held as `placement` says."""
        model = self._placed() if self.placement else self.load_model("cpu" if self._streams else None)
        _ = self.processor  # a damaged one is refused before the work
        return model

    @cached_property
    def placement(self) -> Any:
        """How the model is held for passes over data; None where a command has no choice, or the files leave none."""
        if getattr(self._args, "place", None) is None or self._streams or (model := self.on_disk(check=False)) is None:
            return None
        from .footprint import placement

        if (found := placement(self._args, model)) is None:
            return None
        if (self._asked_to_place or found.way != "whole" or found.size.nbytes >= _LARGE) and not (
            self._args.quiet or self._args.json
        ):
            print(f"model: {found}", file=sys.stderr)
        return found

    def on_disk(self, check: bool = True) -> Any:
        """The model with its weights in the files, another one each time; None where those do not hold them as such.

        Args:
            check: compare the files with their checksums; not for a look at their sizes.
        """
        from ..checkpoint.on_disk import open_on_disk

        return open_on_disk(self._args.model, check=check, **self._loading())

    @cached_property
    def to_change(self) -> Any:
        """A model to change and write: with its weights in the files, of which most are copied, where that will do."""
        from ..checkpoint.copying import can_write
        from ..models.projections import own_capacity

        if getattr(self._args, "place", "auto") in ("auto", "stream") and (model := self.on_disk()) is not None:
            if can_write(model) and not own_capacity(model):
                return model
        return self.model

    @property
    def _asked_to_place(self) -> bool:
        return bool({"place", "budget", "host_memory"} & self._args.given)

    def to_merge(self, recoveries: tuple[str, ...] | list[str]) -> tuple[Any, Any]:
        """(a model to merge, the teacher of its recoveries; None: made of the model itself)"""
        placement = self.placement if recoveries or self._asked_to_place else None
        streamed = recoveries and placement is not None and placement.way == "stream"
        if not streamed:
            return (self.model if recoveries else self.to_change), None
        return self.to_change, self.model

    def dry_run(self) -> Result:
        """What the command would take."""
        found = self.placement
        if found is None:
            return Result({"way": "whole"}, "whole in memory: its files do not hold its weights as the model has them")
        return Result(found.values(), str(found))

    @property
    def _streams(self) -> bool:
        return bool(getattr(self._args, "stream", None))

    def _placed(self) -> Any:
        from ..driver.placement import load

        return load(self._args.model, self.placement, self.on_disk, self._loading())

    def load_model(self, device: str | None = None) -> Any:
        """The model as it is in its folder, another one each time."""
        from ..checkpoint.folder import from_pretrained

        return from_pretrained(self._args.model, **self._loading()).to(device or self._args.device)

    def summary(self) -> tuple[Any, Any]:
        """Summary and structure of the model, of which no more is in memory than has to be."""
        from ..checkpoint.on_disk import summarize

        return summarize(self._args.model, **self._loading())

    @cached_property
    def processor(self) -> Any:
        """The model's tokenizer or image processor, None without one."""
        from ..checkpoint.trusted import load_processor

        return load_processor(self._args.model, self._args.trust_remote_code)

    @cached_property
    def teacher(self) -> Any:
        """The model of --teacher, or None."""
        from ..checkpoint.folder import from_pretrained

        args = self._args
        return from_pretrained(args.teacher, **self._allowed()).to(args.device) if args.teacher else None

    @cached_property
    def task(self) -> Any:
        """--data to train or calibrate on, --eval-data to validate on."""
        return self._load_task(train=self._args.data, validation=self._args.eval_data)

    @cached_property
    def test_task(self) -> Any:
        """--data to evaluate on."""
        return self._load_task(test=self._args.data)

    @cached_property
    def training(self) -> Any:
        """TrainingSettings, evaluating on the task's validation data and keeping the best."""
        from ..driver.training.settings import TrainingSettings
        from ..support.settings import options

        args = vars(self._args)
        given = {option.name: args[option.name] for option in options(TrainingSettings) if option.name in args}
        given |= {"eval_every": args["eval_every"] or args["steps"], "restore_best": True}
        return TrainingSettings(**given, higher_is_better=self.task.higher_is_better)

    def score(self, model: Any) -> float:
        """The task's metric on at most --eval-limit examples."""
        return self.task.score(model, limit=self._args.eval_limit)

    def signature_of_score(self) -> dict[str, Any]:
        """What decides it: the task's data, lengths and metric, and --eval-limit."""
        return self.task.signature() | {"eval_limit": self._args.eval_limit}

    def calibration_batches(self) -> Iterator[dict[str, Any]]:
        """This rank's batches of the task, in an order of their own."""
        from ..support.distributed import rank, world_size

        args = self._args
        return self.task.batches(
            "train", calibration_batch(args, self.model), shuffle=True, seed=args.seed, rank=rank(), world=world_size()
        )

    @cached_property
    def statistics(self) -> Any:
        """Those of --statistics, else collected on the data."""
        from ..merging.statistics import CorrelationStats

        path = getattr(self._args, "statistics", None)
        return CorrelationStats.load(path, max_memory=self._args.max_memory) if path else self._collect()

    @cached_property
    def plan(self) -> Any:
        """That of --plan, else made of --layers or --window."""
        from ..merging.plan import MergePlan, plan

        args, path = self._args, getattr(self._args, "plan", None)
        if path:
            return MergePlan.from_dict(_read_json(path, "plan"))
        needed = args.statistics or args.window or args.method == "permute"
        statistics = self.statistics if needed else None
        model = self._model_to_plan if args.model else None
        with timed(self.seconds, "align"):
            return plan(
                statistics, args.layers, args.window, args.anchor, args.method, model, args.seed, over_ranks=True
            )

    @property
    def _model_to_plan(self) -> Any:
        """The model for a plan, whose weights are read one by one where that will do."""
        return self.model if "model" in vars(self) else self.to_change

    def _collect(self) -> Any:
        from ..merging.collect import collect

        args, model, batches = self._args, self.model, self.calibration_batches()
        layers = getattr(args, "layers", None)
        with timed(self.seconds, "collect"):
            return collect(
                model,
                batches,
                window=None if layers else args.window,
                layers=layers,
                anchor=args.anchor,
                features=args.features,
                max_tokens=args.tokens,
                cache_dir=args.cache_dir,
                fresh=args.fresh,
                max_memory=args.max_memory,
                sketch=None if args.exact else args.sketch or "auto",
            )

    def _load_task(self, **splits: list[str] | None) -> Any:
        """Data of each split (lists of paths, as given) made ready for the model."""
        from ..driver.tasks.load import load_task, task_kind

        args, model = self._args, self.model
        if not args.data:
            raise FFMergeError("data: give --data (a text file or folder, SOURCE TARGET files, images or .npz)")
        kind = args.task or task_kind(model)
        check_kind(args, kind)
        lengths = {"block": args.max_length} if kind in ("lm", "masked") else {"max_length": args.max_length or 128}
        task = load_task(
            model,
            self.processor if args.trust_remote_code and self.processor else args.model,
            **{split: _paths(paths) for split, paths in splits.items() if paths},
            kind=kind,
            stride=args.stride,
            num_beams=args.num_beams,
            prefix=args.prefix,
            metric=args.metric,
            text_column=args.text_column,
            label_column=args.label_column,
            languages=(args.source_lang, args.target_lang),
            bos=not args.no_bos,
            **lengths,
        )
        if task.described() and not (args.quiet or args.json):
            print(f"data: {task.described()}", file=sys.stderr)
        return task

    def _loading(self) -> dict[str, Any]:
        """Options of `from_pretrained`, once the family is known."""
        import torch

        self._register_layout()
        args = self._args
        dtype = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
        return dtype | self._allowed()

    def _allowed(self) -> dict[str, Any]:
        return {"trust_remote_code": self._args.trust_remote_code, "leave_out": self._args.leave_out}

    def _register_layout(self) -> None:
        """Four dotted paths on the command line describe a family that is not in the table."""
        args = self._args
        if not args.ffn_up:
            return
        from ..checkpoint.trusted import model_type
        from ..models.families import MERGED_TYPE_PREFIX, FFNSpec, register_family

        if not args.ffn_down or args.ffn_layers is None:
            raise FFMergeError("--ffn-up needs --ffn-layers and --ffn-down too (and --ffn-gate if the FFN is gated)")
        spec = FFNSpec(args.ffn_layers, args.ffn_up, args.ffn_down, args.ffn_gate, stack=args.ffn_stack)
        register_family(model_type(args.model).removeprefix(MERGED_TYPE_PREFIX), spec)


def _paths(given: list[str]) -> str | tuple[Path, ...]:
    """One path or name of a data set as it is, several as paths: never as texts."""
    return given[0] if len(given) == 1 else tuple(map(Path, given))


def _read_json(path: str, what: str) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FFMergeError(f"{what}: {path} cannot be read ({reason}); give a file that ffmerge wrote") from error
