"""Image folders and .npz files, and their pixels."""

import io

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
