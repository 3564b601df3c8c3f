"""Image sets of JPEG files called ``PART/CLASS/NUMBER.jpg``, in a folder or in a tar archive."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kcomplex.errors import DataError

_PIXELS = (32, 32)
_BROKEN_ARCHIVE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)


def read_jpegs(source: Path, per_class: Mapping[str, int]) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Return the images of every part with their labels, by class and file name.

    Images are uint8 of shape (n, 3, 32, 32); a label is the position of the class among all classes in alphabetical
    order, shape (n,).

    Parameters
    ----------
    source
        A folder, or a tar archive of any compression that Python knows.
    per_class
        The parts and how many images each class has there.

    Raises
    ------
    DataError
        The source can't be read, an image is broken or isn't 32x32 in colour, or there are more or fewer of a class.
    """
    found: dict[tuple[str, str], dict[str, NDArray[np.uint8]]] = {}
    for path, content in _files(source):
        if len(path.parts) >= 3 and path.parts[-3] in per_class and path.suffix == ".jpg":
            part, kind, file = path.parts[-3:]
            found.setdefault((part, kind), {})[file] = _pixels(content, f"{source}: {path}")
    classes = sorted({kind for _, kind in found})
    if not classes:
        raise DataError(f"{source}: holds no images called {'/CLASS/NUMBER.jpg or '.join(per_class)}/CLASS/NUMBER.jpg")
    sets = {}
    for part, count in per_class.items():
        images = []
        for kind in classes:
            pictures = found.get((part, kind), {})
            if len(pictures) != count:
                raise DataError(f"{source}: {part}/{kind} has {len(pictures):,} images, not {count:,}")
            images += [pictures[file] for file in sorted(pictures)]
        sets[part] = np.stack(images).transpose(0, 3, 1, 2), np.repeat(np.arange(len(classes)), count)
    return sets


def _files(source: Path) -> Iterator[tuple[PurePosixPath, Any]]:
    """Yield the files of a folder or archive: their path there, and what Pillow opens."""
    if source.is_dir():
        for file in source.rglob("*.jpg"):
            yield PurePosixPath(file.relative_to(source).as_posix()), file
        return
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield PurePosixPath(member.name), io.BytesIO(content.read())
    except _BROKEN_ARCHIVE as error:
        raise DataError(f"{source}: can't be read as a tar archive: {error}") from error


def _pixels(content: Any, where: str) -> NDArray[np.uint8]:
    """Return an image of shape (32, 32, 3)."""
    try:
        with Image.open(content, formats=["JPEG"]) as image:
            (width, height), mode = image.size, image.mode
            # The header says so: nothing of another size is decoded.
            pixels = np.array(image) if (width, height) == _PIXELS and mode == "RGB" else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} can't be read as a JPEG image: {error}") from error
    if pixels is None:
        raise DataError(f"{where} is {width}x{height} in mode {mode}, not 32x32 in colour")
    return pixels
