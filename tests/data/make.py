"""Writes the files of this folder. Run it in a checkout of commit 179cfe9: `python tests/data/make.py FOLDER`."""

import json
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import ffmerge_fast as ff
from ffmerge_fast import cli

SIZES = dict(vocab_size=40, pad_token_id=1, bos_token_id=2, eos_token_id=3)
DECODER = SIZES | dict(hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
FFNS = dict(encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2)
STACKS = SIZES | FFNS | dict(d_model=8, encoder_layers=2, decoder_layers=2, decoder_start_token_id=1, dropout=0.0)
DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
TRAINING = dict(lr=1e-2, schedule="constant", log_every=1)
PROJECT = "--max-length 24 --d-model 4 --d-ff 8 --attention head_dim --calibration 2 --batch-size 4 --lr 0.01"
PROJECT += " --schedule constant --eval-every 2 --eval-limit 4 --json"


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "marian":
        return transformers.MarianMTModel(transformers.MarianConfig(**STACKS, max_position_embeddings=24)).eval()
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, max_position_embeddings=24)).eval()
    sizes = SIZES | dict(n_embd=8, n_inner=16, n_layer=3, n_head=2, n_positions=24)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **DROPOUT)).eval()


def save_tokenizer(folder: Path) -> None:
    tokens = ["<unk>", "<pad>", "<s>", "</s>", *(f"w{i}" for i in range(36))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = dict(unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def killed_before(stop: int, values):
    for i, value in enumerate(values):
        if i == stop:
            raise KeyboardInterrupt
        yield value


def command(*argv) -> None:
    assert cli.main([*map(str, argv)]) == 0


def main(out: Path) -> None:
    generator, tensors, numbers = torch.Generator().manual_seed(1), {}, {}
    ids = tensors["ids"] = torch.randint(4, 40, (6, 2, 12), generator=generator)
    batches = [{"input_ids": x, "labels": x} for x in ids]
    words = torch.randint(0, 36, (40 * 24,), generator=generator)
    (out / "text.txt").write_text(" ".join(f"w{i}" for i in words.tolist()) + "\n")
    base = model_of("gpt2")
    base.save_pretrained(out / "gpt2")
    save_tokenizer(out / "gpt2")

    layers = {"gpt2": "1-2", "llama": "0-1", "marian": "encoder:0-1,decoder:0-1", "deltas": "0-2"}
    for name in layers:
        teacher = model_of(name)
        merged = ff.merge(teacher, ff.plan(layers=layers[name], method="average", model=teacher))
        if name == "deltas":
            ff.local_distill_(merged, teacher, batches, steps=2, delta_rank=2)
        ff.save_pretrained(merged, out / "merged" / name)
        more = {"decoder_input_ids": ids[1, :1]} if name == "marian" else {}
        with torch.no_grad():
            tensors[f"logits/{name}"] = merged.eval()(input_ids=ids[0, :1], **more).logits

    stats = ff.collect(base, batches, window=2)
    stats.save(out / "statistics.safetensors")
    tensors |= {f"correlation/{i}": stats.correlation(i, i + 1) for i in range(2)}
    with suppress(KeyboardInterrupt):
        ff.collect(base, killed_before(3, batches), window=2, cache_dir=out / "collect-cache", save_seconds=0)
    plan = ff.plan(stats, layers="1-2")
    (out / "plan.json").write_text(json.dumps(plan.to_dict()))
    with torch.no_grad():
        tensors["logits/plan"] = ff.merge(base, plan)(input_ids=ids[0, :1]).logits

    scores = iter([1.0])
    with suppress(StopIteration):  # killed at the second window
        ff.search(base, stats, 2, lambda model: next(scores), resume=out / "search.json")

    scored = ff.importance(base, batches)
    scored.save(out / "importance.safetensors")
    tensors |= {f"importance/{name}": values for name, values in scored.scores.items()}
    with suppress(KeyboardInterrupt):
        ff.importance(base, killed_before(3, batches), cache_dir=out / "importance-cache", save_seconds=0)

    ff.finetune(ff.from_pretrained(out / "merged/gpt2"), batches, 3, output_dir=out / "finetune", **TRAINING)
    whole = ff.finetune(ff.from_pretrained(out / "merged/gpt2"), batches, 6, **TRAINING)
    numbers["finetune"] = [row["loss"] for row in whole.history]

    with tempfile.TemporaryDirectory() as folder:
        options = ["project", out / "gpt2", "--data", out / "text.txt", *PROJECT.split()]
        command(*options, f"{folder}/half", "--steps", 2, "--work-dir", out / "project")
        command(*options, f"{folder}/whole", "--steps", 4, "--work-dir", f"{folder}/work")
        rows = [json.loads(line) for line in Path(f"{folder}/work/log.jsonl").read_text().splitlines()]
        numbers["project"] = [[row["step"], row["metric"]] for row in rows if "metric" in row]
        with torch.no_grad():
            tensors["logits/project"] = ff.from_pretrained(f"{folder}/whole").eval()(input_ids=ids[0, :1]).logits

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "expected.safetensors")
    (out / "expected.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir()
    main(Path(sys.argv[1]))
