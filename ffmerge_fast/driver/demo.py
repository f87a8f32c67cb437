"""`ffmerge demo`: train two small models on data every machine has, and make them smaller in both ways.

A ViT on scikit-learn's handwritten digits and a GPT-2 on the Python standard library's source. Merging takes a third
of their FFNs; projecting takes half of all parameters, beside hard pruning to the same size with as many steps.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import hard_prune
from ..checkpoint.folder import save_pretrained
from ..checkpoint.verify import verify
from ..merging.apply import merge
from ..merging.collect import collect
from ..merging.plan import MergePlan, plan
from ..merging.recover.refit import refit_
from ..merging.search.search import search
from ..merging.statistics import CorrelationStats
from ..projecting.importance import importance
from ..projecting.projector import project
from ..support.env import require
from ..support.files import new_folder, write_json, write_text
from ..support.sizes import format_bytes
from ..support.tables import format_table
from . import evaluate
from .plots import plot_alignment
from .tasks.kinds import TextTask
from .tasks.task import SPLITS, Task
from .training.finetune import finetune

LAYERS, WINDOW = 6, 3  # of 6 FFNs 3 become one: 2, a third, are removed
KEEP = 0.5  # of the parameters, in the projected and the pruned models


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    model: str
    variant: str
    parameters: int
    bytes: int
    metric: str
    value: float


@dataclass(frozen=True)
class _Case:
    """One of the two models, ready to train."""

    name: str
    model: nn.Module
    task: Task
    steps: int
    lr: float
    batch_size: int
    tokenizer: Any = None


def demo(out: Path, seed: int = 0, overwrite: bool = False) -> tuple[dict[str, Any], str]:
    """Run the demo and write `out`: a folder per model, report.md, ffmerge-demo.json and correlation.png.

    Args:
        out: folder to write; it appears when everything is done.
        seed: of the models' weights and the order of the data.
        overwrite: replace a folder that has content; an earlier demo is replaced in any case.

    Returns:
        The table's rows and the seconds taken as values, and the table as text.
    """
    for package in ("transformers", "sklearn", "matplotlib"):
        require(package, extra="driver")
    started = time.monotonic()
    rows: list[Row] = []
    pictures: list[tuple[str, CorrelationStats, MergePlan]] = []
    with new_folder(out, overwrite or (out / _MARK).exists(), _is_ours) as folder, _one_thread():
        for build in (_digits, _stdlib):
            torch.manual_seed(seed)
            case = build(seed)
            case_rows, stats, best = _run(case, folder / case.name, seed)
            rows += case_rows
            pictures.append((case.name, stats, best))
        plot_alignment(pictures, folder / "correlation.png")
        values = {"rows": [asdict(row) for row in rows], "seconds": time.monotonic() - started}
        text = _as_text(rows, values["seconds"], out)
        write_json(folder / _MARK, values)
        write_text(folder / "report.md", f"# ffmerge demo\n\n```\n{text}\n```\n")
    return values, text


def _run(case: _Case, folder: Path, seed: int) -> tuple[list[Row], CorrelationStats, MergePlan]:
    """Train, merge and project as the papers do, tune; each variant is saved, to measure its bytes and to keep."""
    rows = []

    def record(model: nn.Module, variant: str) -> None:
        path = folder / variant.replace(" + ", "-")
        save_pretrained(model, path, case.tokenizer)
        verify(path)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        parameters = sum(p.numel() for p in model.parameters())
        rows.append(Row(case.name, variant, parameters, size, case.task.metric, case.task.score(model, "test")))

    model = case.model
    _train(model, case, case.steps, case.lr, seed)
    record(model, "original")

    def calibration() -> Iterator[dict[str, Tensor]]:
        return case.task.batches("train", 32, shuffle=True, seed=seed)

    stats = collect(model, calibration(), window=WINDOW)
    best = search(model, stats, WINDOW, case.task.score, case.task.higher_is_better)
    averaged = merge(model, plan(stats, best.layers, method="average"))
    permuted = merge(model, best)
    record(averaged, "averaged")
    record(permuted, "permuted")
    refit_(permuted, model, calibration())
    record(permuted, "permuted + refit")
    for merged, variant in ((averaged, "averaged + tuned"), (permuted, "permuted + refit + tuned")):
        _train(merged, case, case.steps // 5, case.lr / 4, seed)
        record(merged, variant)
    few = list(case.task.batches("train", 32, shuffle=True, seed=seed, limit=1024))
    scores = importance(model, few)
    pruned, projector = hard_prune(model, KEEP, importance=scores), project(model, KEEP, importance=scores, init="svd")
    record(pruned, "pruned")
    _train(pruned, case, case.steps // 3, case.lr, seed)
    record(pruned, "pruned + tuned")
    projector.reconstruct_(few)
    record(projector.fold(), "projected")
    _train(projector.student, case, case.steps // 3, case.lr / 4, seed, projector.optimizer())
    record(projector.fold(), "projected + tuned")
    return rows, stats, best


def _is_ours(file: Path) -> bool:
    return len(file.parts) > 2 and file.parts[0] in _MODELS or str(file) in (_MARK, "correlation.png", "report.md")


def _train(model: nn.Module, case: _Case, steps: int, lr: float, seed: int, optimizer=None) -> None:
    settings = dict(batch_size=case.batch_size, schedule="linear", warmup=min(20, steps // 5), seed=seed)
    finetune(model, case.task, steps, lr, optimizer=optimizer, **settings)


# --------------------------------------------------------------------------------------------------------- two models


class _DigitsTask(Task):
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 grey."""

    kind = "images"
    metrics = ("accuracy",)
    batch_size = 256

    def evaluate(self, model, split="validation", batch_size=None, limit=None):
        return {"accuracy": evaluate.accuracy(model, self.batches(split, batch_size, limit=limit))}

    def _batch(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        pixels, labels = self._data[split][:]
        return {"pixel_values": pixels[indices], "labels": labels[indices]}


def _digits(seed: int) -> _Case:
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pixels = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 8 - 1
    data = torch.utils.data.TensorDataset(pixels, torch.tensor(labels)[order])
    parts = torch.utils.data.random_split(data, [1197, 200, 400], generator=torch.Generator().manual_seed(seed))
    splits = {name: torch.utils.data.TensorDataset(*part[:]) for name, part in zip(SPLITS, parts, strict=True)}
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=48,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_labels=10,
        hidden_dropout_prob=0.0,
        initializer_range=0.05,
    )
    return _Case(_MODELS[0], ViTForImageClassification(config), _DigitsTask(splits), steps=300, lr=2e-3, batch_size=64)


def _stdlib(seed: int) -> _Case:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [file.read_text(errors="replace") for file in sorted(folder.glob("*.py"))[:60]]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts[::4], vocab_size=512, special_tokens=[_END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=_END)
    ids = torch.tensor([i for encoding in bpe.encode_batch(texts) for i in encoding.ids])
    task = TextTask(
        {"train": ids[:-_HELD], "validation": ids[-_HELD : -_HELD // 2], "test": ids[-_HELD // 2 :]}, _CONTEXT, None
    )
    config = GPT2Config(
        vocab_size=512,
        n_positions=_CONTEXT,
        n_embd=64,
        n_layer=LAYERS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.05,
    )
    return _Case(_MODELS[1], GPT2LMHeadModel(config), task, steps=300, lr=4e-3, batch_size=16, tokenizer=tokenizer)


_MARK = "ffmerge-demo.json"
_MODELS = "vit-digits", "gpt2-stdlib"
_END = "<|endoftext|>"
_CONTEXT, _HELD = 64, 12_800


# -------------------------------------------------------------------------------------------------------------- table


def _as_text(rows: list[Row], seconds: float, out: Path) -> str:
    cells = [
        [r.model, r.variant, f"{r.parameters:,}", format_bytes(r.bytes), f"{r.value:.4g} {r.metric}"] for r in rows
    ]
    table = format_table(["model", "variant", "parameters", "on disk", "test quality"], cells)
    return f"{table}\n\n{seconds:.0f} s; models, report and correlation.png (before and after alignment) in {out}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small lose more by handing work to a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
