"""Labelled images: a folder with one sub-folder per class, or an .npz file of JPEG bytes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...support.env import require
from ...support.errors import FFMergeError
from .classes import counted, few, labels_of_model
from .documents import existing
from .records import choose_split, visible_files

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
_BEGINNING = 4096  # bytes of an image file by which it is recognised
_SPLITS = {  # what folders of a split are called
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
_CACHE_BYTES = 1 << 30  # preprocessed images of one split kept in memory


class ImageData:
    """Images with labels; `data[i]` is (PIL image in RGB, label).

    Args:
        images: encoded bytes, paths or PIL images.
        labels: one class index each.
        classes: class names; index = label. None: the data has labels without names.
        by_name: whether the labels are no more than the order of the names.
    """

    def __init__(
        self, images: Sequence[Any], labels: Sequence[int], classes: Sequence[str] | None, by_name: bool = False
    ):
        if not len(images):
            raise FFMergeError("image data: no images; give a folder with one sub-folder per class, or an .npz file")
        if len(images) != len(labels):
            raise FFMergeError(f"image data: {len(images)} images but {len(labels)} labels; wanted equal numbers")
        self._images = images
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        self.classes = None if classes is None else list(classes)
        self.by_name = by_name

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pil = require("PIL.Image", extra="driver")
        image = self._images[index]
        try:
            if isinstance(image, (bytes, memoryview)):
                image = pil.open(io.BytesIO(image))
            elif isinstance(image, (str, os.PathLike)):
                image = pil.open(image)
            return image.convert("RGB"), int(self.labels[index])
        except (OSError, SyntaxError, pil.DecompressionBombError) as error:
            where = image if isinstance(image, (str, os.PathLike)) else f"number {index}"
            raise FFMergeError(f"image data: image {where} cannot be read; remove or replace it") from error

    def identity(self) -> list[Any]:
        """What `content_hash` takes: labels, and of each image its bytes, or a file's name, size and beginning."""
        return [self.classes, self.labels, [_identity(image) for image in self._images]]

    def select(self, indices: Sequence[int]) -> ImageData:
        """The images at `indices`, in that order."""
        indices = [int(i) for i in indices]
        images = [self._images[i] for i in indices]
        return ImageData(images, self.labels[indices].numpy(), self.classes, self.by_name)

    def for_model(self, model: Any, what: str) -> ImageData:
        """The same images with the model's labels: by the classes' names, or by number where one side has no names.

        Raises:
            FFMergeError: a class that the model does not have, or names that cannot be compared with the model's.
        """
        labels, names = labels_of_model(model, self.labels, self.classes, self.by_name, "image data", what)
        return self if labels is self.labels else ImageData(self._images, labels.numpy(), names)

    def counts(self) -> str:
        """How many images each class got, in words."""
        return counted(self.labels, self.classes, "images")


def load_images(path: str | os.PathLike, split: str = "train") -> ImageData:
    """Images of a folder (sub-folder names are the classes) or of an .npz file.

    The .npz holds, for a split named s: `s_jpeg` uint8 (all files end to end), `s_offsets` int64 [n + 1], `s_labels`
    [n]; and, if it likes, `classes`. A folder may hold a folder of classes for each split, called train, validation
    (val, valid, dev) or test. Validation and test stand in for one another, and so does the only split there is.
    Hidden files and folders are passed over.

    Raises:
        FFMergeError: nothing there, no images, no such split, splits beside classes, or a damaged file.
    """
    path = existing(path, "image data")
    if path.is_dir():
        splits = _split_folders(path)
        return _load_folder(splits[choose_split(splits, split, path)] if splits else path)
    if path.suffix != ".npz":
        raise FFMergeError(f"image data: {path} is neither a folder with one sub-folder per class nor an .npz file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            there = [name for name in _SPLITS if f"{name}_jpeg" in arrays]
            return _load_arrays(arrays, choose_split(there, split, path) if there else split, path)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        if isinstance(error, FFMergeError):
            raise
        raise FFMergeError(f"image data: {path} is damaged or no .npz file") from error


class PixelReader:
    """Preprocessed pixels [n, channels, height, width] of an `ImageData`, each image decoded once if they fit in 1 GiB.

    Args:
        data: the images.
        processor: an image processor of transformers.
    """

    def __init__(self, data: ImageData, processor: Any):
        self.data, self.processor = data, processor
        self._cache: Tensor | None = None
        self._have = torch.zeros(len(data), dtype=torch.bool)

    def __call__(self, indices: Tensor) -> Tensor:
        """The images at `indices` [n]."""
        if self._cache is None:
            first = self._process(indices[:1].tolist())
            if first[0].nbytes * len(self.data) > _CACHE_BYTES:
                return self._process(indices.tolist())
            self._cache = first.new_empty(len(self.data), *first.shape[1:])
        missing = indices[~self._have[indices]].unique()
        if len(missing):
            self._cache[missing] = self._process(missing.tolist())
            self._have[missing] = True
        return self._cache[indices]

    def identity(self) -> Any:
        """What decides the pixels of an image."""
        settings = getattr(self.processor, "to_dict", dict)()
        return {name: value for name, value in settings.items() if not name.startswith("_")}

    def _process(self, indices: Iterable[int]) -> Tensor:
        return self.processor([self.data[i][0] for i in indices], return_tensors="pt")["pixel_values"]


def _identity(image: Any) -> Any:
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            return [Path(image).name, os.fstat(file.fileno()).st_size, file.read(_BEGINNING)]
    return image if isinstance(image, (bytes, memoryview)) else [image.mode, image.tobytes()]


def _split_folders(folder: Path) -> dict[str, Path]:
    """{split: its folder}; empty for a folder of classes."""
    names = {alias: split for split, aliases in _SPLITS.items() for alias in aliases}
    folders = _folders(folder)
    found = [(names[path.name.lower()], path) for path in folders if path.name.lower() in names]
    others = [path.name for path in folders if path.name.lower() not in names]
    twice = len({split for split, _ in found}) < len(found)
    if found and (others or twice):
        raise FFMergeError(
            f"image data: cannot tell splits from classes in {folder} ({few(path.name for path in folders)}); wanted "
            "one folder per class, or one per split (train, validation, test) with those in it"
        )
    return dict(found)


def _load_folder(folder: Path) -> ImageData:
    found = {path.name: [file for file in visible_files(path) if _is_image(file)] for path in _folders(folder)}
    if not found:
        raise FFMergeError(f"image data: {folder} has no sub-folders; wanted one per class with the images in it")
    classes = sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))
    files = [file for name in classes for file in found[name]]
    if not files:
        raise FFMergeError(f"image data: no images in the sub-folders of {folder}; known are {', '.join(_SUFFIXES)}")
    labels = [label for label, name in enumerate(classes) for _ in found[name]]
    return ImageData(files, labels, classes, by_name=True)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES


def _load_arrays(arrays: Any, split: str, path: Path) -> ImageData:
    missing = [name for name in (f"{split}_jpeg", f"{split}_offsets", f"{split}_labels") if name not in arrays]
    if missing:
        raise FFMergeError(f"image data: {path} has no array {missing[0]!r}; it has {', '.join(sorted(arrays))}")
    jpeg, offsets, labels = (arrays[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
    ordered = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(jpeg) and bool(np.all(np.diff(offsets) >= 0))
    if not ordered or len(offsets) != len(labels) + 1:
        raise FFMergeError(f"image data: {split}_offsets of {path} do not fit its bytes and labels: a damaged file")
    classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    files = memoryview(np.ascontiguousarray(jpeg))
    images = [files[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return ImageData(images, labels, classes)
