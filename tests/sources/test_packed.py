"""Weights of a few bits in words: the codes that were packed come out, one an element; what isn't known is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kcomplex.sources.open import open_weights

CODES = torch.arange(64 * 32).reshape(64, 32) * 7 % 16


def pack(codes: torch.Tensor, axis: int, bits: int = 4, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Return codes in 32-bit words along an axis."""
    codes = codes.movedim(axis, -1)
    count = 32 // bits
    groups = codes.reshape(*codes.shape[:-1], -1, count).to(torch.int64)
    words = sum(groups[..., place] << (bits * position) for position, place in enumerate(order or range(count)))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, axis).contiguous()


def halves(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    first, second = codes.reshape(*codes.shape[:-1], -1, 2).to(torch.uint8).unbind(-1)
    return first * 16 + second if high_first else second * 16 + first


AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 32]}
PACKED = {
    "gptq": (
        "q_proj.qweight",
        {
            "q_proj.qweight": pack(CODES, 0),
            "q_proj.qzeros": pack(CODES[:4], 1),
            "q_proj.scales": torch.ones(4, 32).half(),
            "q_proj.g_idx": torch.arange(64, dtype=torch.int32) // 16,
        },
    ),
    "gptq 8 bits": (
        "qweight",
        {"qweight": pack(CODES, 0, 8), "qzeros": pack(CODES[:4], 1, 8), "scales": torch.ones(4, 32).half()},
    ),
    "awq": (
        "a.qweight",
        {
            "a.qweight": pack(CODES, 1, order=AWQ),
            "a.qzeros": pack(CODES[:4], 1, order=AWQ),
            "a.scales": torch.ones(4, 32).half(),
        },
    ),
    "compressed-tensors": (
        "a.weight_packed",
        {
            "a.weight_packed": pack(CODES, 1),
            "a.weight_scale": torch.ones(64, 1),
            "a.weight_shape": torch.tensor([64, 32]),
        },
    ),
    "bitsandbytes": (
        "w",
        {
            "w": halves(CODES.reshape(1, -1), True).reshape(-1, 1),
            "w.absmax": torch.ones(32),
            "w.quant_map": torch.ones(16),
            "w.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(STATE).encode()), dtype=torch.uint8),
        },
    ),
    "mxfp4": ("a_blocks", {"a_blocks": halves(CODES, False), "a_scales": torch.ones(64, dtype=torch.uint8)}),
    "nvfp4": (
        "a.weight",
        {
            "a.weight": halves(CODES, False),
            "a.weight_scale": torch.ones(64, 2).to(torch.float8_e4m3fn),
            "a.weight_scale_2": torch.ones(()),
        },
    ),
}


@pytest.mark.parametrize("scheme", PACKED)
def test_packed_codes_come_out_one_an_element(tmp_path: Path, scheme: str) -> None:
    name, tensors = PACKED[scheme]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert torch.equal(weights[name].read(), CODES.to(torch.uint8))
        assert weights[name].shape == CODES.shape
        assert set(weights) | {item.name for item in weights.skipped} == set(tensors)
    with open_weights(tensors) as weights:
        assert torch.equal(weights[name].read(), CODES.to(torch.uint8))


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.qweight": pack(CODES, 0)[:3], "a.qzeros": pack(CODES[:4], 1), "a.scales": torch.ones(4, 7)},
        {"a.W_q": halves(CODES, False), "a.scale": torch.ones(4)},
        {"a.codes": torch.ones(3, 4, dtype=torch.int8), "a.codebooks": torch.ones(3)},
        *(
            {"a.qweight": pack(CODES, 0), "a.qzeros": pack(CODES[:4], 1).to(dtype), "a.scales": torch.ones(4, 32)}
            for dtype in (torch.float32, torch.uint32)
        ),
        *(
            {"a.weight_packed": pack(CODES, 1), "a.weight_scale": torch.ones(64, 1), "a.weight_shape": shape}
            for shape in (torch.full((2,), torch.nan), torch.tensor([64, -32]), torch.tensor([True, False]))
        ),
        # Four columns in a word may have 2, 4 or 8 bits.
        {
            "a.weight_packed": torch.ones(64, 1, dtype=torch.int32),
            "a.weight_scale": torch.ones(64, 1),
            "a.weight_shape": torch.tensor([64, 4]),
        },
        {"w": torch.ones(8, 1, dtype=torch.uint8), "w.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=torch.uint8)},
    ],
)
def test_packing_that_isnt_known_is_listed(tensors: dict[str, torch.Tensor]) -> None:
    weights = open_weights(tensors)
    assert [(item.name, item.role) for item in weights.skipped] == [(next(iter(tensors)), "packed")]
    words = open_weights(tensors, count="packed")[next(iter(tensors))]
    assert torch.equal(words.read(), tensors[words.name])


def test_words_without_scales_are_words() -> None:
    assert not open_weights({"qweight": CODES, "codes": CODES, "B": CODES}).skipped
