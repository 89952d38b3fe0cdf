"""Small copies of data sets, laid out on disk as the real ones are."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from torchvision import datasets

from tests.conftest import images_of

#: The split of a data set, and how many images the small copy has in it.
SIZES = {"train": 30, "test": 24, "val": 24}


def colours(n: int, seed: int, classes: int = 3, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class can be seen, larger than `images_of` makes them."""
    images, labels = images_of(n, seed, classes)
    return images.repeat(size // 8, axis=1).repeat(size // 8, axis=2), labels


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- CIFAR ---


def cifar_batch(pixels: np.ndarray, **labels: list[int]) -> bytes:
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    held = {"batch_label": "one", "data": np.ascontiguousarray(rows), **labels}
    return pickle.dumps(held, protocol=2)


def cifar10(root: Path, classes: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    made = {}
    for k, split in enumerate(("train", "test")):
        pixels, labels = colours(SIZES[split], k, classes, 32)
        made[split] = pixels, labels
        folder = root / "cifar-10-batches-py"
        if split == "test":
            write(folder / "test_batch", cifar_batch(pixels, labels=labels.tolist()))
            continue
        for b in range(5):
            part = slice(6 * b, 6 * b + 6)
            batch = cifar_batch(pixels[part], labels=labels[part].tolist())
            write(folder / f"data_batch_{b + 1}", batch)
    names = [f"class{k}" for k in range(10)]
    write(folder / "batches.meta", pickle.dumps({"label_names": names}, protocol=2))
    return made


def cifar100(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    made = {}
    folder = root / "cifar-100-python"
    for k, split in enumerate(("train", "test")):
        pixels, labels = colours(SIZES[split], k, 3, 32)
        made[split] = pixels, labels
        fine, coarse = labels.tolist(), (labels + 7).tolist()
        write(folder / split, cifar_batch(pixels, fine_labels=fine, coarse_labels=coarse))
    names = [f"fine{k}" for k in range(100)]
    write(folder / "meta", pickle.dumps({"fine_label_names": names}, protocol=2))
    return made


def packed(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


# --- SVHN, Flowers-102, CUB, Caltech-256 ---


def svhn(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    made = {}
    root.mkdir(parents=True, exist_ok=True)
    for k, split in enumerate(("train", "test")):
        pixels, labels = colours(SIZES[split], k, 3, 32)
        made[split] = pixels, labels
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        held = {"X": pixels.transpose(1, 2, 3, 0), "y": digits}
        scipy.io.savemat(root / f"{split}_32x32.mat", held, do_compression=True)
    return made


def flowers102(root: Path) -> dict[str, np.ndarray]:
    pixels, labels = colours(78, 0, 3, 16)
    for k, image in enumerate(pixels):
        write(root / "jpg" / f"image_{k + 1:05d}.jpg", jpeg(image))
    order = np.random.default_rng(0).permutation(78) + 1
    parts = {"trnid": order[:30], "valid": order[30:54], "tstid": order[54:]}
    scipy.io.savemat(root / "imagelabels.mat", {"labels": (labels + 1).astype(np.uint8)[None]})
    scipy.io.savemat(root / "setid.mat", {key: ids[None] for key, ids in parts.items()})
    names = {"train": "trnid", "val": "valid", "test": "tstid"}
    return {split: labels[parts[key] - 1] for split, key in names.items()}


def cub2011(root: Path) -> dict[str, list[int]]:
    folder = root / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    pixels, labels = colours(54, 0, 3, 16)
    rows: dict[str, list[str]] = {"images": [], "train_test_split": [], "image_class_labels": []}
    made: dict[str, list[int]] = {"train": [], "test": []}
    for k, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True), 1):
        name = f"{classes[label]}/bird_{k:04d}.jpg"
        write(folder / "images" / name, jpeg(image))
        split = "train" if k <= 30 else "test"
        rows["images"].append(f"{k} {name}")
        rows["train_test_split"].append(f"{k} {int(split == 'train')}")
        rows["image_class_labels"].append(f"{k} {label + 1}")
        made[split].append(label)
    for name, lines in rows.items():
        write(folder / f"{name}.txt", "\n".join(lines) + "\n")
    write(folder / "classes.txt", "".join(f"{k} {n}\n" for k, n in enumerate(classes, 1)))
    return made


def caltech256(root: Path) -> list[str]:
    classes = ["001.ak47", "002.american-flag", "003.backpack"]
    pixels, labels = colours(60, 0, 3, 16)
    for k, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        name = f"{label + 1:03d}_{k:04d}.jpg"
        write(root / "256_ObjectCategories" / classes[label] / name, jpeg(image))
    return classes


def authenticate(root: Path, replace: Callable[[object, str, object], None]) -> None:
    """Have torchvision take the files below a folder for those that are distributed."""
    held = {path.name: path for path in sorted(root.rglob("*")) if path.is_file()}

    def md5(name: str, otherwise: str) -> str:
        return hashlib.md5(held[name].read_bytes()).hexdigest() if name in held else otherwise

    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        for table in ("train_list", "test_list"):
            replace(kind, table, [[name, md5(name, old)] for name, old in getattr(kind, table)])
        replace(kind, "tgz_md5", md5(kind.filename, kind.tgz_md5))
        replace(kind, "meta", kind.meta | {"md5": md5(kind.meta["filename"], kind.meta["md5"])})
    splits = {
        split: [url, name, md5(name, old)]
        for split, (url, name, old) in datasets.SVHN.split_list.items()
    }
    replace(datasets.SVHN, "split_list", splits)
    name, old = datasets.imagenet.ARCHIVE_META["devkit"]
    archives = datasets.imagenet.ARCHIVE_META | {"devkit": (name, md5(name, old))}
    replace(datasets.imagenet, "ARCHIVE_META", archives)
    table = datasets.Flowers102._file_dict
    replace(datasets.Flowers102, "_file_dict", {k: (n, md5(n, v)) for k, (n, v) in table.items()})


# --- ImageNet ---

WNIDS = ("n01440764", "n01443537", "n01484850")


def imagenet(root: Path, flat: bool = False) -> np.ndarray:
    """Class folders; with ``flat``, validation images loose, and the devkit beside them."""
    pixels, labels = colours(30, 0, 3, 16)
    for k, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        wnid = WNIDS[label]
        write(root / "train" / wnid / f"{wnid}_{k}.JPEG", jpeg(image))
    pixels, labels = colours(24, 1, 3, 16)
    for k, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True), 1):
        name = f"ILSVRC2012_val_{k:08d}.JPEG"
        write(root / "val" / ("" if flat else WNIDS[label]) / name, jpeg(image))
    if flat:
        devkit(root, labels)
    return labels


def devkit(root: Path, labels: np.ndarray) -> Path:
    """The devkit's archive: classes in an order of its own, with inner nodes behind the leaves."""
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    numbers = {label: 3 - label for label in range(3)}
    lines = [str(numbers[label]) for label in labels.tolist()]
    write(folder / "ILSVRC2012_validation_ground_truth.txt", "\n".join(lines) + "\n")
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    kinds = [(name, "O") for name in names]
    synsets = np.zeros((4, 1), dtype=kinds)
    for label, number in numbers.items():
        synsets[number - 1, 0] = (float(number), WNIDS[label], "a fish", "swims", 0.0)
    synsets[3, 0] = (1001.0, "n00001740", "entity", "is", 2.0)
    scipy.io.savemat(folder / "meta.mat", {"synsets": synsets}, do_compression=True)
    archive = packed(folder.parent, root / "ILSVRC2012_devkit_t12.tar.gz")
    shutil.rmtree(folder.parent)
    return archive


# --- tar shards ---


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shards(root: Path, n: int = 2) -> np.ndarray:
    root.mkdir(parents=True, exist_ok=True)
    pixels, labels = colours(30, 0, 3, 16)
    for s in range(n):
        members = {}
        for k in range(s, 30, n):
            members[f"{k:05d}.jpg"] = jpeg(pixels[k])
            members[f"{k:05d}.cls"] = str(labels[k]).encode()
            members[f"{k:05d}.json"] = json.dumps({"label": 2}).encode()
        shard(root / f"shard-{s:03d}.tar", members)
    return np.concatenate([labels[s::n] for s in range(n)])
