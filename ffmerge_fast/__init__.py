"""Make trained Transformers smaller: merge feed-forward sublayers, project whole models."""

from importlib import metadata as _metadata

from . import nn, ops
from .baselines import from_scratch, hard_prune, tie_without_average
from .checkpoint.folder import from_pretrained, save_pretrained, verify
from .driver.training.finetune import finetune
from .integrations.transformers import register_when_imported as _register_when_imported
from .merging.apply import expand_, merge, merge_, print_parameters
from .merging.collect import collect
from .merging.plan import MergeGroup, MergePlan, plan
from .merging.recover.distill import local_distill_
from .merging.recover.refit import refit_
from .merging.recover.reports import DistillGroup, DistillReport, RefitGroup, RefitReport
from .merging.search.search import search, sweep
from .merging.statistics import CorrelationStats
from .models.families import FFNSpec, register_family, supported_families
from .models.sublayers import FFNSublayer, find_ffns
from .models.ties import is_merged, shared_groups
from .ops.common.backends import backends, use_backend
from .ops.correlation import CorrelationState
from .projecting.importance import Importance, importance
from .projecting.projector import Projector, project
from .runtime.accelerate.accelerate import accelerate_, restore_
from .runtime.streaming.stream import WeightStream, stream_, unstream_
from .support.errors import FFMergeError

__all__ = [
    "CorrelationState",
    "CorrelationStats",
    "DistillGroup",
    "DistillReport",
    "FFMergeError",
    "FFNSpec",
    "FFNSublayer",
    "Importance",
    "MergeGroup",
    "MergePlan",
    "Projector",
    "RefitGroup",
    "RefitReport",
    "WeightStream",
    "accelerate_",
    "backends",
    "collect",
    "expand_",
    "find_ffns",
    "finetune",
    "from_pretrained",
    "from_scratch",
    "hard_prune",
    "importance",
    "is_merged",
    "local_distill_",
    "merge",
    "merge_",
    "nn",
    "ops",
    "plan",
    "print_parameters",
    "project",
    "refit_",
    "register_family",
    "restore_",
    "save_pretrained",
    "search",
    "shared_groups",
    "stream_",
    "supported_families",
    "sweep",
    "tie_without_average",
    "unstream_",
    "use_backend",
    "verify",
]

try:
    __version__ = _metadata.version("ffmerge_fast")
except _metadata.PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

_register_when_imported()
