"""Images by position, decoded from files or sliced from arrays.

Files may come from strangers: only plain image formats are decoded, and their size is checked
before memory is allocated. Every exception of Pillow's on a damaged file becomes a DataError.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import os
import stat
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from hashlib import blake2b
from io import BufferedReader, BytesIO, StringIO
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from bnfix.core.errors import BnfixError, DataError, one_line, plain, some

# Decoders hold several copies of an image: at these limits the worst format stays below 1 GB.
MAX_PIXELS = 50_000_000
MAX_IMAGE_BYTES = 256 << 20
#: Bytes of the hash that identifies an image.
DIGEST_SIZE = 6
# Batch size per thread when hashing: reading waits for the disk, and hashing releases the GIL.
_HASHED_AT_ONCE = 256
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Not every plugin: some of Pillow's formats start other programs (EPS), some are rarely tested.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ORIENTATION = 0x0112
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}
_STRIP_PIXELS = 1 << 22


class Images(ABC):
    """One opened DATA: its images by position, and their labels if there are any."""

    kind: str
    noun = "images"
    labels: np.ndarray | None = None  # int64 (n,)
    class_names: tuple[str, ...] | None = None  # by class index
    classes: tuple[str, ...] = ()  # its class folders, including empty ones
    classes_given: Any = None  # before numbering, for `for_outputs`
    #: Replace labels that are not classes, with ``take(index)`` and ``digest(i)``.
    targets: Any = None
    #: Whether targets move with the pixels: a mask (H, W), or boxes; `target` gives one.
    moves = False
    #: The group of each example if examples depend on each other: int64 (n,), into ``group_names``.
    groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    #: The source of each image if several DATA are combined: int64 (n,).
    sources: np.ndarray | None = None
    unused: Sequence[str] = ()  # unused arrays of its file
    _hash_threads = 1

    def __init__(self, spec: str, channels: int) -> None:
        self.spec, self.channels = spec, channels
        self.fields: dict[str, list[str]] = {}  # columns of labels.csv
        self.notes: list[str] = []  # on assumptions and skipped files
        self.shaped: dict[Any, Any] = {}  # resized images, cached for `Batches`
        self._digests: dict[int, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes decode; sending them the decoded images would copy those to each worker.
        return self.__dict__ | {"shaped": {}, "_digests": {}, "classes_given": None, "fields": {}}

    @abstractmethod
    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The name of image ``i`` in messages and reports."""
        return f"item {i}"

    def read(self, i: int) -> np.ndarray:
        """Pixels, uint8 (H, W, C): first frame, upright, no alpha; DataError for a bad image."""
        raise DataError(f"{self.spec}: item {i} is not an image.")

    def colours(self) -> list[str]:
        """A note if one of three images loses its colours."""
        whole = copy.copy(self)
        whole.channels = 3
        for i in (0, len(self) // 2, len(self) - 1) if self.channels == 1 else ():
            with suppress(DataError):
                if np.ptp(whole.read(i), axis=2).any():
                    return ["colour images, converted to grey by ITU-R 601 luma"]
        return []

    @property
    def labelled(self) -> bool:
        """Whether examples have labels or other targets."""
        return self.labels is not None or self.targets is not None or self.moves

    def target(self, i: int) -> Any:
        """The target of one example that moves with its pixels."""
        return self.targets.items[i].numpy()

    def target_digest(self, i: int) -> bytes:
        """Six bytes that identify a target other than a class; empty without targets."""
        digest: bytes = b"" if self.targets is None else self.targets.digest(i)
        return digest

    @abstractmethod
    def _hash(self, i: int) -> bytes: ...

    def digest(self, i: int) -> bytes:
        """Six bytes that identify an image: a hash of its file, or of its shape and pixels."""
        return self.digests([i])[0]

    def digests(self, index: Iterable[int] | None = None) -> list[bytes]:
        """The digests of all images or some; an unreadable file gets a hash of its name."""
        wanted = range(len(self)) if index is None else [int(i) for i in index]
        missing = [i for i in wanted if i not in self._digests]
        parts = [missing[k : k + _HASHED_AT_ONCE] for k in range(0, len(missing), _HASHED_AT_ONCE)]
        with ThreadPoolExecutor(self._hash_threads) as pool:
            found = pool.map(lambda part: [self._hash(i) for i in part], parts)
            for part, hashes in zip(parts, found, strict=True):
                self._digests.update(zip(part, hashes, strict=True))
        return [self._digests[i] for i in wanted]


class EncodedImages(Images):
    """Encoded images: each is a file or a run of bytes."""

    @abstractmethod
    def _stream(self, i: int) -> BufferedReader | BytesIO: ...

    def read(self, i: int) -> np.ndarray:
        """Decode the first frame."""
        with self._open(i) as image:
            return pixels_of(image, self.channels)

    def _hash(self, i: int) -> bytes:
        return digest_of_file(lambda: self._stream(i), self.name(i))

    def _open(self, i: int) -> AbstractContextManager[Image.Image]:
        return opened(lambda: self._stream(i), self.name(i), self._path(i))

    def _path(self, i: int) -> Path:
        return Path(self.spec)


class FileImages(EncodedImages):
    """Images in a folder, one file each."""

    _hash_threads = 16

    def __init__(self, root: Path, kind: str, files: Sequence[str], channels: int) -> None:
        super().__init__(str(root), channels)
        self.root, self.kind, self.files = root, kind, list(files)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """The image's path inside the folder, on one line."""
        name = self.files[i].encode("utf-8", "backslashreplace").decode()
        signs = (s if s.isprintable() else s.encode("unicode_escape").decode() for s in name)
        return "".join(signs)

    def _stream(self, i: int) -> BufferedReader | BytesIO:
        return open_regular(self._path(i))

    def _path(self, i: int) -> Path:
        return self.root / self.files[i]


class ArrayImages(Images):
    """Images in one array, (N, H, W, C) uint8 with 1, 3 or 4 channels (the fourth is alpha)."""

    kind = "npz"

    def __init__(self, spec: str, array: np.ndarray, channels: int) -> None:
        super().__init__(spec, channels)
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Several images at once, in the requested channels."""
        pixels: np.ndarray = self.array[index]
        if pixels.shape[3] == 4:
            pixels = pixels[..., :3]
        if pixels.shape[3] == self.channels:
            return pixels
        if self.channels == 3:
            return np.repeat(pixels, 3, axis=3)
        # ITU-R 601 luma in Pillow's fixed point, so files and arrays agree.
        r, g, b = (pixels[..., k].astype(np.uint32) for k in range(3))
        luma = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
        return np.expand_dims(luma.astype(np.uint8), 3)

    def name(self, i: int) -> str:
        """The image's place in the array."""
        return f"images[{i}]"

    def read(self, i: int) -> np.ndarray:
        """Slice the array."""
        image: np.ndarray = self.take(np.asarray([i]))[0]
        return image

    def _hash(self, i: int) -> bytes:
        return digest_of(self.array[i])


class SeveralImages(Images):
    """The images of several sources; ``sources`` holds the source of each image."""

    def __init__(self, parts: Sequence[Images]) -> None:
        super().__init__(" + ".join(part.spec for part in parts), parts[0].channels)
        kinds = {part.kind for part in parts}
        self.parts, self.kind = list(parts), kinds.pop() if len(kinds) == 1 else "several"
        self._hash_threads = max(part._hash_threads for part in parts)
        sizes = [len(part) for part in parts]
        self._starts = np.cumsum([0, *sizes])
        self.sources: np.ndarray = np.repeat(np.arange(len(parts)), sizes)
        self.classes = tuple(sorted({name for part in parts for name in part.classes}))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, i: int) -> tuple[Images, int]:
        source = int(self.sources[i])
        return self.parts[source], i - int(self._starts[source])

    def name(self, i: int) -> str:
        """The image's source, then its name there."""
        part, k = self._place(i)
        return f"{part.spec}: {part.name(k)}"

    def read(self, i: int) -> np.ndarray:
        """Read the image from its source."""
        part, k = self._place(i)
        return part.read(k)

    def _hash(self, i: int) -> bytes:
        part, k = self._place(i)
        return part._hash(k)


#: Images, and the class of each by name or number, or None without classes.
Opened = tuple[Images, list[Any] | np.ndarray | None]


@contextmanager
def parsing(problem: str, advice: str = "", path: Path | None = None) -> Iterator[None]:
    """Turn every exception of a parser on a damaged or hostile file into a DataError."""
    try:
        yield
    except BnfixError:  # it names the fault already
        raise
    except Exception as error:  # third-party parsers have no common base class of errors
        # The text of other errors, such as a KeyError, says little without the type.
        reason = plain(error, 300) if isinstance(error, OSError | ValueError) else ""
        raise DataError(f"{problem} ({reason or one_line(error)}).{advice}", path=path) from error


def parsing_file(path: Path) -> AbstractContextManager[None]:
    """Refuse an empty file, and turn every error of its reader into a DataError."""
    if not path.stat().st_size:
        raise DataError("is empty (0 bytes). Download it again.", path=path)
    return parsing(f"is damaged, or no {path.suffix} file", " Download it again.", path)


def faults_of(problems: Mapping[str, Sequence[str]]) -> str:
    """All faults in one text: reporting one at a time would cost the user a run per fault."""
    return "; ".join(f"{len(v):,} {what} ({some(v)})" for what, v in problems.items() if v)


@contextmanager
def opened(
    stream: Callable[[], BufferedReader | BytesIO],
    name: str,
    path: Path,
    formats: tuple[str, ...] = _FORMATS,
) -> Iterator[Image.Image]:
    """Open an image file and check its size; the pixels are not decoded yet."""
    try:
        with warnings.catch_warnings(), stream() as file:
            # Pillow warns about large or odd files; the cases that matter are errors below.
            warnings.simplefilter("ignore")
            if file.seek(0, os.SEEK_END) > MAX_IMAGE_BYTES:
                raise OSError(f"more than {MAX_IMAGE_BYTES >> 20} MiB")
            file.seek(0)
            with Image.open(file, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except BnfixError:  # from the caller's block
        raise
    except Exception as error:  # Pillow's decoders have no common base class of errors
        known = "a known format" if formats == _FORMATS else formats[0]
        reasons: dict[type, str] = {
            Image.DecompressionBombError: f"more than {MAX_PIXELS:,} pixels",
            UnidentifiedImageError: f"not an image in {known}",
            FileNotFoundError: "no such file",
        }
        reason = reasons.get(type(error)) or plain(error) or type(error).__name__
        raise DataError(f"{name}: bad image, {reason}.", name=name, path=path) from error


def digest_of_file(stream: Callable[[], BufferedReader | BytesIO], name: str) -> bytes:
    """Hash a file; an unreadable file gets the hash of its name."""
    with suppress(Exception), stream() as file:
        return hashlib.file_digest(file, lambda: blake2b(digest_size=DIGEST_SIZE)).digest()
    return blake2b(name.encode(), digest_size=DIGEST_SIZE, key=b"name").digest()


def digest_of(pixels: np.ndarray) -> bytes:
    """Hash an image by its shape and raw pixels."""
    pixels = np.ascontiguousarray(pixels)
    digest = blake2b(repr(pixels.shape).encode(), digest_size=DIGEST_SIZE)
    digest.update(pixels.data)
    return digest.digest()


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; refuse pipes and devices, which could block forever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.open("rb")


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """Decode an image: first frame, upright, 8 bit, no alpha."""
    image.load()
    orientation = 1
    with suppress(Exception):  # a broken tag block does not harm the pixels
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    pixels = np.empty((image.height, image.width, channels), dtype=np.uint8)
    # In strips: a second copy of a large image in its own mode would double the memory.
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = pixels[top : top + rows]
        whole = len(strip) == image.height
        part = image if whole else image.crop((0, top, image.width, top + len(strip)))
        if part.mode.startswith("I"):
            part = _shallow(np.asarray(part))
        strip[:] = np.asarray(part.convert("RGB" if channels == 3 else "L")).reshape(strip.shape)
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


def _shallow(deep: np.ndarray) -> Image.Image:
    """Scale integer pixels of up to 16 bits to 8 bits; Pillow would clip them."""
    if deep.min() < 0 or deep.max() > 65535:
        raise ValueError("more than 16 bits per pixel")
    return Image.fromarray(((deep.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))


def list_images(folder: Path) -> tuple[list[str], list[str], int]:
    """A folder's image files, subfolders and number of other files, without hidden entries."""
    files, folders, n_others = [], [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(SUFFIXES):
                files.append(entry.name)
            else:
                n_others += 1
    return sorted(files), sorted(folders), n_others


def misplaced(root: Path, files: Iterable[str]) -> dict[str, list[str]]:
    """Listed files that are missing or, on any system, outside their folder."""
    outside, missing = [], []
    for name in dict.fromkeys(files):
        path = PureWindowsPath(name)  # it accepts / and \ as separators
        if not name or path.anchor or ".." in path.parts:
            outside.append(name)
        elif not _is_file(root / name):
            missing.append(name)
    return {"outside the folder": outside, "missing": missing}


def _is_file(path: Path) -> bool:
    with suppress(OSError, ValueError):  # the name is not possible for a file
        return path.is_file()
    return False


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole file of up to ``limit`` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        raise ValueError(f"{path.name}: larger than {limit // 10**6} MB")
    return content


def read_object(path: Path, where: str, limit: int) -> dict[str, Any]:
    """Read a JSON object that is not empty and has unique names."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [plain(key, 60) for key, n in Counter(key for key, _ in pairs).items() if n > 1]
        if twice:
            raise DataError(f"{where}: duplicate names: {some(twice)}. Keep one.", path=path)
        return dict(pairs)

    if not path.exists():
        raise DataError(f"{where}: no such file.", path=path)
    with parsing(f"{where}: cannot be read as JSON", path=path):
        content = json.loads(read_bytes(path, limit), object_pairs_hook=unique)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{where}: expected a JSON object that is not empty.", path=path)
    return content


def read_rows(path: Path, limit: int) -> list[list[str]]:
    """Read the nonempty rows of a CSV file, without spaces around cells."""
    content = read_bytes(path, limit)
    with parsing(f"{path.name}: not a readable CSV file"):
        text = content.decode("utf-8-sig")
        rows = [[cell.strip() for cell in row] for row in csv.reader(StringIO(text, newline=""))]
    return [row for row in rows if any(row)]
