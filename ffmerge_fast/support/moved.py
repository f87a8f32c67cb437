"""Where modules went when the package got its rooms: an import of an old name says the new one."""

from __future__ import annotations

import importlib.abc
import sys

_PACKAGE = __name__.partition(".")[0]
MOVED = {
    "_backend": "ops.common.backends",
    "_cli_options": "cli.options",
    "_env": "support.env",
    "_errors": "support.errors",
    "_ffn_layout": "runtime.accelerate.forms",
    "_ffn_trial": "runtime.accelerate.trial",
    "_folders": "support.files",
    "_library": "ops.common.registry",
    "_manifest": "checkpoint.manifest",
    "_modeling": "remote_code",
    "_modeling.modeling_ffmerge": "remote_code.modeling_ffmerge",
    "_progress": "support.progress",
    "_stream_guard": "models.streamed",
    "_stream_loader": "runtime.streaming.loader",
    "_stream_passes": "runtime.streaming.schedule",
    "_stream_plan": "runtime.streaming.plan",
    "_stream_source": "runtime.streaming.source",
    "_table": "support.tables",
    "_tuning": "ops.common.tuning",
    "_weight_files": "support.tensor_files",
    "accelerate": "runtime.accelerate.accelerate",
    "checkpoint.EXTRAS": "checkpoint.folder.EXTRAS",
    "checkpoint.from_pretrained": "checkpoint.folder.from_pretrained",
    "checkpoint.load_processor": "checkpoint.trusted.load_processor",
    "checkpoint.save_pretrained": "checkpoint.folder.save_pretrained",
    "driver.data": "driver.tasks",
    "driver.distributed": "support.distributed",
    "driver.finetune": "driver.training.finetune",
    "driver.hub": "driver.tasks.hub",
    "driver.images": "driver.tasks.images",
    "driver.losses": "driver.training.losses",
    "driver.projecting": "driver.project_run",
    "driver.report": "driver.plots",
    "driver.run_folder": "driver.training.run_folder",
    "driver.schedules": "driver.training.schedules",
    "driver.text": "driver.tasks.text",
    "driver.training_state": "driver.training.state",
    "env_report": "driver.environment",
    "merge": "merging",
    "merge.align": "merging.plan",
    "merge.collect": "merging.collect",
    "merge.combine": "merging.apply",
    "merge.deltas": "merging.recover.deltas",
    "merge.distill": "merging.recover.distill",
    "merge.distill_report": "merging.recover.reports",
    "merge.layers": "merging.groups",
    "merge.local": "merging.recover.recording",
    "merge.passes": "calibration.passes",
    "merge.prefix": "merging.search.prefix",
    "merge.proxy": "merging.search.proxy",
    "merge.recover": "merging.recover.refit",
    "merge.refit_group": "merging.recover.least_squares",
    "merge.refit_report": "merging.recover.reports",
    "merge.refit_rounds": "merging.recover.rounds",
    "merge.select": "merging.search.search",
    "merge.statistics": "merging.statistics",
    "merge.streams": "calibration.blocks",
    "models.FFNSpec": "models.families.FFNSpec",
    "models.FFNSublayer": "models.sublayers.FFNSublayer",
    "models.base_model_path": "models.sublayers.base_model_path",
    "models.base_model_type": "models.sublayers.base_model_type",
    "models.find_ffns": "models.sublayers.find_ffns",
    "models.is_conv1d": "models.projections.is_conv1d",
    "models.register_family": "models.families.register_family",
    "models.supported_families": "models.families.supported_families",
    "ops._activations": "ops.common.activations",
    "ops.correlation.accumulators": "ops.correlation.products",
    "ops.correlation.layout": "ops.correlation.packing",
    "ops.correlation.merging": "ops.correlation.moments",
    "ops.correlation.sums": "ops.correlation.moments",
    "ops.projection.rows": "ops.projection.registered",
    "ops.shared_ffn.buffers": "ops.shared_ffn.gradient_buffers",
    "project": "projecting",
    "project.activations": "projecting.activations",
    "project.adamw": "projecting.optimizer.adamw",
    "project.base_weights": "projecting.optimizer.base_weights",
    "project.basis": "projecting.bases",
    "project.blockwise": "projecting.optimizer.blockwise",
    "project.fold": "projecting.student",
    "project.importance": "projecting.importance",
    "project.layout": "projecting.axes",
    "project.matrix": "projecting.matrices",
    "project.optimizer": "projecting.optimizer.optimizer",
    "project.owned_state": "projecting.optimizer.state",
    "project.ownership": "projecting.optimizer.ownership",
    "project.projected": "projecting.parameters",
    "project.projector": "projecting.projector",
    "project.selection": "projecting.selection",
    "project.student": "projecting.student",
    "project.units": "projecting.matrices",
    "stream": "runtime.streaming.stream",
}


def name_the_new_home() -> None:
    """Answer imports of moved modules, once nothing else has found them, with an error that names the new module."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


class _Moved(importlib.abc.MetaPathFinder):
    """Finds nothing; raises ImportError for what has moved."""

    def find_spec(self, name, path=None, target=None):
        package, _, old = name.partition(".")
        if package == _PACKAGE and old in MOVED:
            asked = _asked_for(old)
            raise ImportError(f"{_PACKAGE}.{asked} is now {_PACKAGE}.{MOVED[asked]}", name=name)


def _asked_for(old: str) -> str:
    """The moved module whose import began with its package `old`: importlib's frames still hold its name."""
    frame = sys._getframe()
    while frame is not None:
        name = str(frame.f_locals.get("name")).removeprefix(f"{_PACKAGE}.")
        if name in MOVED and name.startswith(f"{old}."):
            return name
        frame = frame.f_back
    return old
