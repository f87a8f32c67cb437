"""Image folders and .npz files, and their pixels."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ffmerge_fast import FFMergeError
from ffmerge_fast.driver.tasks.images import ImageData, PixelReader, load_images

Image = pytest.importorskip("PIL.Image")


def picture(value: int, size: int = 16):
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "jpeg")
    return file.getvalue()


def write_npz(path, values=(0, 100, 200), split="train", **changes):
    files = [jpeg(value) for value in values]
    arrays = {
        f"{split}_jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        f"{split}_offsets": np.cumsum([0, *map(len, files)]),
        f"{split}_labels": np.arange(len(values), dtype=np.uint8),
        "classes": np.array([f"class {i}" for i in range(len(values))]),
    }
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


@pytest.fixture
def folder(tmp_path):
    for name, values in (("dog", (10, 20)), ("cat", (200,))):
        (tmp_path / name).mkdir()
        for value in values:
            picture(value).save(tmp_path / name / f"{value}.png")
    (tmp_path / "dog/notes.txt").write_text("no image")
    return tmp_path


def test_folder_of_classes(folder):
    data = load_images(folder)
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0, 1, 1]
    assert [int(np.asarray(data[i][0]).mean()) for i in range(3)] == [200, 10, 20]
    picked = data.select([2, 0])
    assert [(int(np.asarray(image).mean()), label) for image, label in (picked[0], picked[1])] == [(20, 1), (200, 0)]


def test_folder_with_splits(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    (root / "test").symlink_to(folder)
    assert len(load_images(root, "test")) == 3


def test_npz(tmp_path):
    data = load_images(write_npz(tmp_path / "x.npz"))
    assert data.classes == ["class 0", "class 1", "class 2"]
    assert data.labels.tolist() == [0, 1, 2]
    for i, value in enumerate((0, 100, 200)):
        image, label = data[i]
        assert image.mode == "RGB" and abs(np.asarray(image).mean() - value) < 3 and label == i


def test_pixels_are_the_processors_and_cached(folder):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1] * 3, image_std=[0.5] * 3)
    data = load_images(folder)
    calls = []

    def counting(images, **options):
        calls.append(len(images))
        return processor(images, **options)

    read = PixelReader(data, counting)
    got = read(torch.tensor([2, 0, 2]))
    assert got.shape == (3, 3, 8, 8)
    torch.testing.assert_close(got.mean((1, 2, 3)), (torch.tensor([20, 200, 20]) / 255 - 0.1) / 0.5)
    first = len(calls)
    assert torch.equal(read(torch.tensor([0, 2])), got[1:])
    assert len(calls) == first
    read(torch.arange(3))
    assert calls[first:] == [1]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(train_labels=None), "no array 'train_labels'"),
        (dict(train_labels=np.zeros(5)), "do not fit"),
        (dict(train_offsets=np.array([0, 5, 3, 9])), "do not fit"),
    ],
)
def test_damaged_npz(tmp_path, changes, words):
    with pytest.raises(FFMergeError, match=words):
        load_images(write_npz(tmp_path / "x.npz", **changes))


def test_truncated_npz_and_other_files(tmp_path):
    whole = write_npz(tmp_path / "x.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare/class").mkdir(parents=True)
    for name, words in (
        ("cut.npz", "damaged or no .npz"),
        ("x.txt", "neither a folder"),
        ("none", "does not exist"),
        ("empty", "no sub-folders"),
        ("bare", "no images in the sub-folders"),
    ):
        with pytest.raises(FFMergeError, match=words) as caught:
            load_images(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_unreadable_image_is_named(folder):
    (folder / "cat/200.png").write_bytes(b"no png")
    with pytest.raises(FFMergeError, match="200.png cannot be read"):
        load_images(folder)[0]
    with pytest.raises(FFMergeError, match="image number 0 cannot be read"):
        ImageData([b"nothing"], [0], ["a"])[0]
    with pytest.raises(FFMergeError, match="1 images but 2 labels"):
        ImageData([b""], [0, 1], ["a"])


def classes(root, names, count=1):
    """Folder `root` with a folder of `count` pictures of each name; their grey values count from 1."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(count):
            picture(1 + i * count + j).save(root / name / f"{j}.png")
    return root


def model_of(**names):
    config = SimpleNamespace(num_labels=len(names), id2label={label: name for name, label in names.items()})
    return SimpleNamespace(config=config)


NAMED = model_of(cat=0, dog=1, traffic_light=2)
NAMELESS = model_of(LABEL_0=0, LABEL_1=1)


def grey_and_label(data):
    return [(int(np.asarray(image).mean()), label) for image, label in (data[i] for i in range(len(data)))]


def test_labels_are_the_models_by_name(tmp_path):
    data = load_images(classes(tmp_path / "a", ["Traffic light", "dog"])).for_model(NAMED, "test")
    assert grey_and_label(data) == [(1, 2), (2, 1)] and data.classes == ["cat", "dog", "traffic_light"]
    assert data.counts() == "2 images, 2 classes: dog 1, traffic_light 1"
    (tmp_path / "a/aaa").mkdir()  # empty, unknown: nobody's label
    assert grey_and_label(load_images(tmp_path / "a").for_model(NAMED, "test")) == [(1, 2), (2, 1)]
    npz = load_images(write_npz(tmp_path / "x.npz", classes=np.array(["dog", "traffic-light", "cat"])))
    assert npz.for_model(NAMED, "test").labels.tolist() == [1, 2, 0]
    npz = load_images(write_npz(tmp_path / "y.npz", classes=None))
    assert npz.for_model(NAMED, "test").labels.tolist() == [0, 1, 2]
    numbers = load_images(classes(tmp_path / "n", ["10", "9"])).for_model(NAMELESS, "test")
    assert grey_and_label(numbers) == [(2, 0), (1, 1)]  # in the order of numbers


def test_names_that_are_not_the_models(tmp_path):
    bird = load_images(classes(tmp_path / "a", ["bird", "cat"]))
    with pytest.raises(FFMergeError, match="no class 'bird' of the test data, it has cat, dog, traffic_light; name"):
        bird.for_model(NAMED, "test")
    one = load_images(classes(tmp_path / "b", ["cat"]))
    with pytest.raises(FFMergeError, match=r"1 classes in the test data \(cat\), but the model has 2 without names"):
        one.for_model(NAMELESS, "test")


def test_splits_under_their_usual_names(tmp_path):
    classes(tmp_path / "a/train", ["cat", "dog"], 2)
    classes(tmp_path / "a/val", ["cat", "dog"])
    (tmp_path / "a/__MACOSX").mkdir()
    sizes = [len(load_images(tmp_path / "a", split)) for split in ("train", "validation", "test")]
    assert sizes == [4, 2, 2]
    classes(tmp_path / "b/dev", ["cat", "dog"])
    assert load_images(tmp_path / "b", "train").classes == ["cat", "dog"]  # the only one there is
    classes(tmp_path / "c/val", ["cat"])
    classes(tmp_path / "c/test", ["cat"])
    with pytest.raises(FFMergeError, match="c has no train split, only test, validation; give"):
        load_images(tmp_path / "c")
    (tmp_path / "a/extra").mkdir()
    with pytest.raises(FFMergeError, match="cannot tell splits from classes in .*extra, train, val"):
        load_images(tmp_path / "a")


def test_hidden_copies_are_no_images(folder):
    for hidden in ("cat/.ipynb_checkpoints", "cat/__MACOSX", "dog/.thumbnails"):
        (folder / hidden).mkdir()
        picture(1).save(folder / hidden / "1.png")
    picture(1).save(folder / "cat/._200.png")
    assert load_images(folder).labels.tolist() == [0, 1, 1]
