"""A training run goes on in its folder only if it is the same run, and only with what it wrote."""

import random
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import ffmerge_fast as ff
from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.tasks.images import ImageData
from ffmerge_fast.driver.tasks.kinds import ImageTask, TextTask, TranslationTask
from ffmerge_fast.driver.tasks.text import PairEncoder
from ffmerge_fast.driver.training.finetune import finetune
from tests.helpers.training import assert_equal, lm_batches, parameters, tied_gpt2, tiny_tokenizer

OPTIONS = dict(lr=1e-2, save_every=2, eval_every=2, log_every=2)
DATA = lm_batches(3)
HELD_OUT = lm_batches(1, seed=1)[0]


def evaluate(model):
    return float(model(**HELD_OUT).loss)


def train(folder, steps=4, model=None, data=DATA, **changes):
    model = tied_gpt2() if model is None else model
    options = dict(evaluate=evaluate) | OPTIONS | changes
    return model, finetune(model, data, steps, output_dir=folder, **options)


@pytest.fixture
def kept(tmp_path):
    train(tmp_path)
    return tmp_path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(folder, words, **changes):
    before = contents(folder)
    with pytest.raises(FFMergeError, match=words) as error:
        train(folder, 6, **changes)
    assert "\n" not in str(error.value) and contents(folder) == before


def other_weights(seed=9):
    model = tied_gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[seed, 0] += 1e-7
    return model


def text_task(seed=0, **changes):
    ids = torch.randint(4, 60, (240,), generator=torch.Generator().manual_seed(seed))
    options = dict(block=12, stride=None, metric="loss") | changes
    return TextTask({"train": ids[:160], "validation": ids[160:]}, **options)


# ---------------------------------------------------------------------------------------------------- of the same run


def test_other_batches_are_refused(kept):
    changed = [dict(batch) for batch in DATA]
    changed[2] = {name: ids.clone() for name, ids in changed[2].items()}
    changed[2]["labels"][0, 0] = 7
    for data in (changed, DATA[:2], DATA[::-1], text_task()):
        refuse(kept, "resume: .* was made with other data", data=data)
    train(kept, 6, data=[dict(batch) for batch in DATA])


def test_other_weights_and_another_teacher_are_refused(kept):
    refuse(kept, "made with other weights", model=other_weights())
    refuse(kept, "made with other distillation", teacher=tied_gpt2())
    taught = kept / "taught"
    train(taught, teacher=tied_gpt2())
    refuse(taught, "made with other teacher", teacher=other_weights())
    train(kept / "limits", signature={"limit": 2})
    with pytest.raises(FFMergeError, match="made with other limit: 2 there, 3 now"):
        train(kept / "limits", 6, signature={"limit": 3})


def test_the_trained_model_itself_goes_on(tmp_path):
    """As in a notebook: the model that a run has trained, with its last or its best weights, is that run's."""
    wanted, _ = train(tmp_path / "whole", 8)
    model, _ = train(tmp_path / "parts", 4)
    train(tmp_path / "parts", 6, model)
    train(tmp_path / "parts", 8, model, restore_best=False)
    assert_equal(parameters(model), parameters(wanted))
    scores = iter([1.0, 2.0, 3.0])  # the best are those of step 2
    options = dict(restore_best=True, evaluate=lambda m: next(scores))
    model, _ = train(tmp_path / "best", 4, **options)
    train(tmp_path / "best", 6, model, **options)


def test_tasks_are_the_same_by_what_they_hold(tmp_path):
    task, score = text_task(), dict(evaluate=None)
    train(tmp_path, data=task, **score)
    refuse(tmp_path, "made with other data", data=text_task(1), **score)
    refuse(
        tmp_path, "made with other metric: 'loss' there, 'perplexity' now", data=text_task(metric="perplexity"), **score
    )
    refuse(tmp_path, "made with other max_length: 12 there, 10 now", data=text_task(block=10), **score)
    refuse(tmp_path, "made with other stride: None there, 6 now", data=text_task(stride=6), **score)
    train(tmp_path, 6, data=text_task(), **score)


def test_signatures_of_pairs_and_images(tmp_path):
    pairs = [("a b", "b a"), ("c", "d")]
    tokenizer, other = tiny_tokenizer(tmp_path / "a"), tiny_tokenizer(tmp_path / "b", appends_end=True)

    def of_pairs(data=pairs, tokenizer=tokenizer, length=8, **options):
        return TranslationTask(
            {"train": data}, PairEncoder(tokenizer, length, options.pop("prefix", "")), **options
        ).signature()

    found = [of_pairs(), of_pairs(pairs[::-1]), of_pairs(length=9), of_pairs(prefix="x"), of_pairs(num_beams=2)]
    assert len({str(signature) for signature in found}) == 5 and of_pairs() == of_pairs(tokenizer=other)

    image = pytest.importorskip("PIL.Image")
    for name, colour in (("one", 3), ("two", 5)):
        image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / f"{name}.png")

    def of_images(files, labels=(0, 1), size=8):
        processor = type("P", (), {"to_dict": lambda self: {"size": size, "_path": str(tmp_path)}})()
        return ImageTask({"train": ImageData(files, labels, "ab")}, processor).signature()["data"]

    one, two = (tmp_path / f"{name}.png" for name in ("one", "two"))
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=lambda *_: {"a", "b"})
    whole = one.read_bytes()
    found = [of_images([one, two]), of_images([two, one]), of_images([one, two], (1, 0)), of_images([one, two], size=4),
             of_images([whole, two.read_bytes()]), of_images([two.read_bytes(), whole])]  # fmt: skip
    assert len(set(found)) == 6 and found[0] == of_images([tmp_path / "copy/one.png", tmp_path / "copy/two.png"])
    one.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    assert of_images([one, two]) != found[0]


def test_fresh_starts_over(kept):
    data = lm_batches(3, seed=4)
    wanted, _ = train(None, 3, data=data)
    model, result = train(kept, 3, data=data, fresh=True)
    assert_equal(parameters(model), parameters(wanted))
    assert [row["step"] for row in result.history] == [2, 2, 3, 3]
    assert sorted(path.name for path in kept.glob("checkpoint-*")) == ["checkpoint-3"]


def test_a_second_run_in_the_folder_is_refused(kept):
    seen = []

    def other():
        try:
            train(kept, 8)
        except FFMergeError as error:
            seen.append(str(error))

    def start_other(row):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    train(kept, 6, log=start_other)
    assert seen and all("output_dir: " in line and "is in use by process" in line for line in seen)
    train(kept, 8)
    assert not list(kept.glob(".lock*"))


# ------------------------------------------------------------------------------------------------- and what it wrote


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    train(tmp_path / "kept")
    wanted, _ = train(tmp_path / "whole", 6)
    choice = random.Random(0)
    files = sorted((tmp_path / "kept/checkpoint-4").iterdir())
    assert len(files) == 4
    refused = 0
    for file in files * 6:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
        damaged = tmp_path / "run/checkpoint-4" / file.name
        content = bytearray(damaged.read_bytes())
        content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        damaged.write_bytes(content)
        try:
            model, _ = train(tmp_path / "run", 6)
            assert_equal(parameters(model), parameters(wanted))
        except FFMergeError as error:
            assert "checkpoint-4 cannot be read" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused >= 20


def test_the_best_weights_are_checked(tmp_path):
    scores = iter([1.0, 2.0, 3.0])
    train(tmp_path, evaluate=lambda m: next(scores))
    file = tmp_path / "best-2/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2001] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(FFMergeError, match="best-2 cannot be read .*changed.*; remove it"):
        train(tmp_path, 6, evaluate=lambda m: next(scores), restore_best=True)


@pytest.mark.parametrize("file", ["model", "optimizer", "rng"])
def test_files_of_other_runs_and_steps_are_noticed(kept, file):
    train(kept / "other", data=lm_batches(3, seed=4))
    train(kept / "later", 6)
    place = kept / f"checkpoint-4/{file}.safetensors"
    for source in ("other/checkpoint-4", "later/checkpoint-6"):
        shutil.copy(kept / f"{source}/{file}.safetensors", place)
        refuse(kept, rf"checkpoint-4 cannot be read \({file}.safetensors is of another ")
    if file == "model":
        shutil.copy(kept / f"best-{max(int(p.name[5:]) for p in kept.glob('best-*'))}/model.safetensors", place)
        refuse(kept, "model.safetensors is of another file: best-")


def test_moments_of_what_is_not_trained_are_refused(kept):
    file = kept / "checkpoint-4/optimizer.safetensors"
    save_file(load_file(file) | {"exp_avg/nothing": torch.zeros(1)}, file)  # as of an earlier version: no checksums
    refuse(kept, "moments of nothing, which is not trained")


def test_a_flipped_bit_of_importances_is_noticed(tmp_path):
    model = tied_gpt2()
    found = ff.importance(model, DATA)
    found.save(tmp_path / "i")
    content, choice = (tmp_path / "i").read_bytes(), random.Random(0)
    for _ in range(60):
        bad = bytearray(content)
        bad[choice.randrange(len(bad))] ^= 1 << choice.randrange(8)
        (tmp_path / "i").write_bytes(bad)
        with pytest.raises(FFMergeError, match="importance: .*(is damaged|no file of importances)"):
            ff.Importance.load(tmp_path / "i")
