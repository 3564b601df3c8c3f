"""Augmentation: training images changed anew in every epoch."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

_SHIFT_MARGIN, _CROP_MARGIN = 1, 4


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images moved by up to one place each way, zeros coming in; see `crop_and_flip`."""
    rows, columns = _places(images, _SHIFT_MARGIN, generator)
    return _taken(images, _SHIFT_MARGIN, rows, columns)


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return images moved by up to four places each way, zeros coming in, and every second one or so mirrored.

    Parameters
    ----------
    images
        Shape (n, channels, height, width).
    generator
        Of the processor, on whichever device the images are.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun: Deep residual learning for image recognition. arXiv:1512.03385, 2015, section 4.2.
    """
    rows, columns = _places(images, _CROP_MARGIN, generator)
    mirrored = torch.rand(len(images), 1, generator=generator) < 0.5
    return _taken(images, _CROP_MARGIN, rows, torch.where(mirrored, columns.flip(1), columns))


def _places(images: torch.Tensor, margin: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows and columns of the padded images that are taken, shapes (n, height) and (n, width)."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    return top + torch.arange(height), left + torch.arange(width)


def _taken(images: torch.Tensor, margin: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    places = torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]
    image, row, column = (place.to(images.device) for place in places)
    return pad(images, (margin,) * 4)[image, :, row, column].permute(0, 3, 1, 2)
