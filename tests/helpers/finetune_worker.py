"""One rank of a run on two processes; started twice by test_distributed.py. Usage: RANK FOLDER."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ffmerge_fast.driver.training import state as training_state
from ffmerge_fast.driver.training.finetune import finetune
from tests.helpers.tiny_models import tiny_inputs
from tests.helpers.training import delta_gpt2, lm_batches, tied_gpt2, tied_marian

SETTINGS = dict(lr=1e-2, schedule="constant", eps=1e-2, log_every=1)
STEPS = 3
MODELS = {
    "gpt2": tied_gpt2,
    "gpt2-deltas": delta_gpt2,
    "gpt2-half": lambda: tied_gpt2().half(),
    "marian": tied_marian,
}


def gpt2_batches():
    """Micro-batches with different numbers of labels; rank r of two takes every second one."""
    return lm_batches(8, padded=True)


def marian_batches(model):
    return [tiny_inputs(model, seed=seed, padded=seed % 3 == 0) for seed in range(6)]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for parallel in ("ddp", "fsdp2"):
        for name, make in MODELS.items():
            model = make()
            batches = marian_batches(model) if name == "marian" else gpt2_batches()
            accumulate = 1 if name == "marian" else 2
            finetune(model, batches, STEPS, accumulate=accumulate, parallel=parallel, **SETTINGS)
            _save(folder / f"{parallel}-{name}-{rank}.safetensors", model)
        _resume(folder / f"{parallel}-run", parallel, rank, folder)
    torch.distributed.destroy_process_group()


def _resume(output_dir: Path, parallel: str, rank: int, folder: Path) -> None:
    """With dropout: two steps, then three more from the checkpoint; and five at once."""

    def evaluate(model):
        return float(model(**lm_batches(1, seed=9)[0]).loss)

    options = dict(parallel=parallel, evaluate=evaluate, eval_every=2, restore_best=True) | SETTINGS
    for steps in (2, 5):
        model = tied_gpt2(dropout=0.2)
        finetune(model, gpt2_batches(), steps, output_dir=output_dir, **options)
    _save(folder / f"{parallel}-resumed-{rank}.safetensors", model)
    model = tied_gpt2(dropout=0.2)
    finetune(model, gpt2_batches(), 5, **options)
    _save(folder / f"{parallel}-whole-{rank}.safetensors", model)


def _save(file: Path, model: torch.nn.Module) -> None:
    save_file(training_state.gathered(dict(model.named_parameters())), file)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
