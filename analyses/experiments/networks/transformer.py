"""Transformers for small images and for characters, of PyTorch's own layers."""

from __future__ import annotations

import torch
from torch import nn

# Of embeddings, as in GPT-2: what is tied to an output layer must begin small.
_DEVIATION = 0.02


class _Stack(nn.Module):
    """Learnt positions, blocks of attention, and a last norm: vectors (n, length, width) to such vectors."""

    mask: torch.Tensor | None

    def __init__(self, length: int, width: int, depth: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.positions.weight, std=_DEVIATION)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        mask = nn.Transformer.generate_square_subsequent_mask(length) if causal else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        length = vectors.shape[1]
        vectors = vectors + self.positions(torch.arange(length, device=vectors.device))
        mask = None if self.mask is None else self.mask[:length, :length]
        for block in self.blocks:
            vectors = block(vectors, src_mask=mask, is_causal=mask is not None)
        normed: torch.Tensor = self.norm(vectors)
        return normed


class VisionTransformer(nn.Module):
    """Images as patches, each a vector; the mean of what becomes of them is classified.

    Parameters
    ----------
    channels, size, classes
        Of the images; the size is (height, width).
    patch
        Side of a patch; images are filled up with zeros at the right and at the bottom.
    width, depth, heads
        Of the vectors, the stack of blocks, and attention.

    References
    ----------
    A. Dosovitskiy et al.: An image is worth 16x16 words: transformers for image recognition at scale. arXiv:2010.11929,
    2020. Without a class token, as L. Beyer, X. Zhai, A. Kolesnikov: arXiv:2205.01580, 2022.
    """

    def __init__(
        self, channels: int, size: tuple[int, int], classes: int, patch: int, width: int, *, depth: int, heads: int
    ) -> None:
        super().__init__()
        rows, columns = (-(-side // patch) for side in size)
        self.padding = nn.ZeroPad2d((0, columns * patch - size[1], 0, rows * patch - size[0]))
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.stack = _Stack(rows * columns, width, depth, heads, causal=False)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (n, classes) of images (n, channels, height, width)."""
        vectors = self.patches(self.padding(images)).flatten(2).transpose(1, 2)
        logits: torch.Tensor = self.classifier(self.stack(vectors).mean(1))
        return logits


class CharacterModel(nn.Module):
    """Predicts each next character from those so far; the output layer's weights are those of the embedding.

    Parameters
    ----------
    classes
        Size of the alphabet.
    length
        Most characters that are looked back on.
    width, depth, heads
        Of the vectors, the stack of blocks, and attention.

    References
    ----------
    A. Radford et al.: Language models are unsupervised multitask learners. OpenAI, 2019. O. Press, L. Wolf: Using the
    output embedding to improve language models. arXiv:1608.05859, 2016 (the tied weights).
    """

    def __init__(self, classes: int, length: int, width: int, *, depth: int, heads: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(classes, width)
        nn.init.normal_(self.characters.weight, std=_DEVIATION)
        self.stack = _Stack(length, width, depth, heads, causal=True)
        self.head = nn.Linear(width, classes, bias=False)
        self.head.weight = self.characters.weight

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return logits (n, length, classes) of the characters that follow those of windows (n, length), int64."""
        logits: torch.Tensor = self.head(self.stack(self.characters(characters)))
        return logits
