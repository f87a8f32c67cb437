"""Groups of options that commands of `ffmerge` share. Nothing here needs torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..driver.training.settings import STEPS, TrainingSettings
from ..merging.settings import ANCHORS, METHODS, RECOVERIES, SMALLEST_SKETCH
from ..projecting.settings import INITS, OFFLOADS, SHARES, STATES, Reconstructing, Widths
from ..projecting.settings import METHODS as METHODS_OF_IMPORTANCE
from ..support.settings import Range, options
from .outputs import file_to_write, folder_to_write, work_folder
from .values import file, number, path, size

WINDOW = Range(at_least=2)  # layers
PLACES = ("auto", "cpu", "cuda", "stream")


def argument(*names: str, **options) -> Callable[[argparse.ArgumentParser], None]:
    return lambda parser: parser.add_argument(*names, **options)


def common_options(parser) -> None:
    group = parser.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("-v", "--verbose", action="store_true", help="show warnings of libraries, and tracebacks")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bars, no warnings")
    settings_options(group, TrainingSettings, seed=None)
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    group.add_argument("--online", action="store_true", help="allow downloads from the Hugging Face hub")


def model_options(parser) -> None:
    parser.add_argument("model", type=path, help="folder of a transformers model, or a hub id with --online")
    loading_options(parser)


def loading_options(parser) -> None:
    help_trust = "run the code in the model's folder, for a class or tokenizer that transformers does not have"
    parser.add_argument("--trust-remote-code", action="store_true", help=help_trust)
    help_drop = "drop weights that the model's class has no place for, by name (with * and ?)"
    parser.add_argument("--leave-out", action="append", default=[], metavar="NAME", help=help_drop)
    group = parser.add_argument_group("layout of a family that is not known (dotted paths)")
    group.add_argument("--ffn-layers", metavar="PATH", help="list of blocks, such as 'encoder.layers'")
    group.add_argument("--ffn-up", metavar="PATH", help="W_up inside a block, such as 'mlp.up_proj'")
    group.add_argument("--ffn-down", metavar="PATH", help="W_down inside a block")
    group.add_argument("--ffn-gate", metavar="PATH", help="W_gate inside a block, of gated FFNs")
    group.add_argument("--ffn-stack", default="decoder", choices=("encoder", "decoder"))


def data_options(parser) -> None:
    group = parser.add_argument_group("data")
    help_data = "files or folders of text or records (JSON, CSV, Parquet); SOURCE TARGET files; images; a hub data set"
    group.add_argument("--data", type=path, nargs="+", metavar="PATH", help=help_data)
    group.add_argument(
        "--task",
        choices=("lm", "masked", "images", "classification", "translation"),
        help="default: what the model is for",
    )
    group.add_argument("--text-column", metavar="NAME", help="of records (default: the only one with text)")
    group.add_argument("--label-column", metavar="NAME", help='of records to classify (default: "label" or "labels")')
    group.add_argument("--metric", help="perplexity, loss, accuracy or bleu (default: the task's first)")
    group.add_argument(
        "--max-length", type=number(int, at_least=2), help="tokens per block or sentence (default: the context; 128)"
    )
    group.add_argument(
        "--stride", type=number(int, at_least=1), help="of the perplexity's sliding window (default: no overlap)"
    )
    group.add_argument("--no-bos", action="store_true", help="no beginning-of-text token before every block and window")
    group.add_argument("--prefix", default="", help="put before every source sentence")
    group.add_argument("--source-lang", metavar="CODE", help="of a model of many languages, such as eng_Latn")
    group.add_argument("--target-lang", metavar="CODE")
    group.add_argument("--num-beams", type=number(int, at_least=1), default=1, help="of translations")
    group.add_argument("--batch-size", type=number(int, at_least=1), default=16)
    group.add_argument("--eval-limit", type=number(int, at_least=1), metavar="N", help="evaluate on at most N examples")


def stream_options(parser) -> None:
    group = parser.add_argument_group("a model that is larger than its device")
    help_stream = "load each block's weights, from its files or host memory, while the block before it runs"
    group.add_argument("--stream", choices=("disk", "host"), help=help_stream)
    help_budget = "most bytes of weights on the device at once (default 20GiB)"
    group.add_argument("--stream-budget", type=size, metavar="20GiB", help=help_budget)


def place_options(parser) -> None:
    group = parser.add_argument_group("a model that is large")
    help_place = "auto: whole on --device if it fits, else over all GPUs, else block by block from its files (stream)"
    group.add_argument("--place", default="auto", choices=PLACES, help=help_place)
    help_budget = "most bytes on the device, for weights and what is computed (default: what is free)"
    group.add_argument("--budget", type=size, metavar="20GiB", help=help_budget)
    group.add_argument(
        "--host-memory", type=size, metavar="64GiB", help="most bytes on the host (default: what is free)"
    )
    group.add_argument("--dry-run", action="store_true", help="say what it takes, and stop")


def statistics_option(parser) -> None:
    parser.add_argument("--statistics", type=file, help="file written by `ffmerge collect`")


def validation_option(parser) -> None:
    parser.add_argument(
        "--eval-data", type=path, nargs="+", metavar="PATH", help="to evaluate on (default: a tenth of --data)"
    )


def collect_options(parser) -> None:
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--tokens", type=number(int, at_least=2), default=10_000, help="calibration tokens (default 10000)"
    )
    group.add_argument("--features", default="pre", choices=("pre", "post"), help="before or after the activation")
    group.add_argument("--cache-dir", type=work_folder, help="keep running sums here, so that a killed run goes on")
    sketch = group.add_mutually_exclusive_group()
    sketch.add_argument(
        "--sketch",
        type=number(int, at_least=SMALLEST_SKETCH),
        metavar="ROWS",
        help="rows per layer from which any pair's correlation is estimated (default: 1024 or more, or exact where "
        "that is cheaper or few tokens come)",
    )
    sketch.add_argument("--exact", action="store_true", help="exact correlations, as in the paper")
    fresh_option(group, "begin anew, whatever --cache-dir (and search's --resume) holds")
    memory_option(group)


def memory_option(parser) -> None:
    help_memory = "for the sums of each stack; beyond it features are kept on disk (TMPDIR), of a GPU on the host"
    parser.add_argument("--max-memory", type=size, metavar="8GiB", help=help_memory)


def choice_options(parser) -> None:
    parser.add_argument("--layers", help="'4-7', '0-2,6-8', '1+4+7', 'encoder:2-4,decoder:2-4'")
    parser.add_argument("--window", type=number(int, WINDOW), help="number of adjacent layers")
    anchor_option(parser)


def anchor_option(parser) -> None:
    parser.add_argument("--anchor", default="first", choices=ANCHORS)


def method_option(parser) -> None:
    parser.add_argument("--method", default="permute", choices=METHODS)


def out_options(parser) -> None:
    parser.add_argument("out", type=folder_to_write, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a saved model")
    parser.add_argument("--max-shard-size", type=size, default="5GB", help="largest weight file")


def search_options(parser) -> None:
    group = parser.add_argument_group("scores")
    help_evaluate = "the metric, or proxy: the shared FFNs' errors on --data, without evaluating the model"
    group.add_argument("--evaluate", default="metric", choices=("metric", "proxy"), help=help_evaluate)
    group.add_argument(
        "--proxy-tokens", type=number(int, at_least=2), default=2048, metavar="N", help="that the proxy takes (2048)"
    )
    group.add_argument("--resume", type=file_to_write, help="JSON file that keeps the metric's scores")


def recover_options(parser) -> None:
    group = parser.add_argument_group("recovery without training the model")
    help_recover = "refit: W_down by least squares; distill: the shared FFNs trained on their layers' own inputs"
    choices = ("none", *RECOVERIES, "+".join(RECOVERIES))
    group.add_argument("--recover", default="none", choices=choices, help=help_recover)
    group.add_argument(
        "--ridge", type=number(float, at_least=0), default=1e-2, help="larger keeps W_down closer to the merged one"
    )
    help_rounds = "refits after the first, on the merged model's own stream; the best by held-out loss is kept"
    group.add_argument("--recover-rounds", type=number(int, at_least=0), default=0, metavar="N", help=help_rounds)
    group.add_argument(
        "--recover-steps", type=number(int, STEPS), default=400, metavar="N", help="of distill (default 400)"
    )
    group.add_argument(
        "--recover-lr", type=number(float, more_than=0, at_most=1000), default=1e-3, help="of distill (default 1e-3)"
    )
    help_deltas = "distill gives each layer low-rank deltas W + A B of rank R (default 0: none), saved with the model"
    help_private = "refit gives each layer K neurons of its own beside the shared ones (default 0: none), saved with it"
    group.add_argument("--private", type=number(int, at_least=0), default=0, metavar="K", help=help_private)
    group.add_argument("--delta-rank", type=number(int, at_least=0), default=0, metavar="R", help=help_deltas)


def project_options(parser) -> None:
    group = parser.add_argument_group("projection")
    help_keep = "share of the parameters, such as 0.5; or the widths:"
    settings_options(group, Widths, keep=help_keep, d_model=None, d_ff=None, attention="what gets fewer with d_model")
    group.add_argument("--share", choices=SHARES[1:], help="projections in common (default: none)")
    help_init = "first P: coordinates, or directions (default: svd if reconstructed, else selection)"
    group.add_argument("--init", choices=INITS, help=help_init)
    help_no = "start with the pruned model, as in the paper, not with one fitted to the base block by block"
    group.add_argument("--no-reconstruct", action="store_true", help=help_no)
    settings_options(group, Reconstructing, ridge=None, local_steps=None, local_lr=None)
    group.add_argument(
        "--no-residual", action="store_true", help="W_C = P W P without R; not reconstructed, which R is for"
    )
    group.add_argument("--tied", action="store_true", help="keep the head tied to the embeddings")
    group.add_argument("--importance", type=file, metavar="FILE", help="scores saved by importance(...).save")
    group.add_argument("--method", default="activation", choices=METHODS_OF_IMPORTANCE, help="or measure them so")
    group.add_argument(
        "--calibration",
        type=number(int, at_least=1),
        default=32,
        metavar="N",
        help="batches to measure them and to reconstruct on",
    )
    group.add_argument("--weight-decay-on-projections", type=number(float, at_least=0, at_most=1000), default=0.0)
    group.add_argument("--state", default="fp32", choices=STATES, help="moments of P and R")
    group.add_argument("--offload-base", choices=OFFLOADS, help="where the base's weights wait")
    group.add_argument("--distill", action="store_true", help="from the base model itself, by --alpha")
    help_clone = "with --distill: also hold what each matrix gives to what the base's gives, by --clone-weight"
    group.add_argument("--clone", action="store_true", help=help_clone)
    settings_options(group, TrainingSettings, clone_weight=None)


def finetune_options(parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=number(int, STEPS), required=True)
    settings_options(
        group,
        TrainingSettings,
        lr=None,
        schedule=None,
        warmup=None,
        lr_end="floor of the linear and cosine schedules",
        decay_steps="steps from --lr to --lr-end (default: all)",
        weight_decay=None,
        accumulate="micro-batches per step",
        max_grad_norm=None,
        autocast=None,
    )
    group.add_argument("--teacher", type=path, help="folder of a model to distil from")
    settings_options(
        group,
        TrainingSettings,
        alpha="weight of the distillation loss",
        parallel="under torchrun",
        eval_every="steps (default: once, at the end)",
        save_every="steps; a killed run goes on from the last",
    )
    group.add_argument("--work-dir", type=work_folder, help="log and checkpoints (default: OUT.finetune)")
    fresh_option(group, "begin anew: what an earlier run left in the work folder is removed")


def fresh_option(parser, help: str) -> None:
    parser.add_argument("--fresh", action="store_true", help=help)


def settings_options(group, settings: type, **helps: str | None) -> None:
    """Flags for fields of a settings class: its types, ranges, defaults and choices, the command line's own words."""
    known = {option.name: option for option in options(settings)}
    for name, text in helps.items():
        option, flag = known[name], f"--{name.replace('_', '-')}"
        kind = number(option.type, option.range) if option.type in (int, float) else option.type
        group.add_argument(flag, type=kind, default=option.default, choices=option.choices or None, help=text)
