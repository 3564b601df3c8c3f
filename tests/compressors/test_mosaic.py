"""Mosaic: nothing is lost without a number of motifs, and a mosaic costs what it is worth."""

import math
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from threadpoolctl import threadpool_info, threadpool_limits

from kcomplex.compressors.mosaic.mosaic import Mosaic
from kcomplex.compressors.tables.block_labels import block_keys, label_keys
from kcomplex.compressors.tables.codebook import narrow, pack_codebook, sorted_rows, unpack_codebook, widen
from kcomplex.errors import SpecError, StreamError, WeightsError
from kcomplex.estimators.coder import Quantised
from kcomplex.estimators.pipeline import build_estimator
from kcomplex.estimators.structure import Reader, varint
from kcomplex.measuring.measure import describe
from kcomplex.measuring.stream import decode_checkpoint, encode_checkpoint, prove
from kcomplex.motifs import nearest
from kcomplex.motifs.blocks import blocks_of
from kcomplex.sources.open import open_weights
from kcomplex.weights import words_of

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def mosaic_tensors(motifs=300, size=4, dtype=torch.float32, shapes=((200, 40), (64, 3, 3, 3), (333,)), seed=0):
    """Tensors whose blocks repeat few motifs, zero often among them."""
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(motifs, size, generator=generator).to(dtype)
    bank[0] = 0
    tensors = {}
    for index, shape in enumerate(shapes):
        count = -(-torch.Size(shape).numel() // size)
        chosen = (torch.rand(count, generator=generator) ** 2 * motifs).long()
        tensors[f"w{index}"] = bank[chosen].reshape(-1)[: torch.Size(shape).numel()].reshape(shape).clone()
    return tensors


def check_lossless(tensors, spec):
    description = describe(tensors, spec)[0]
    assert description.lossless
    assert description.distortion == 0
    decoded = decode_checkpoint(encode_checkpoint(tensors, spec))
    for name, tensor in tensors.items():
        assert decoded[name].dtype is tensor.dtype
        assert decoded[name].shape == tensor.shape
        assert words_of(decoded[name]).tobytes() == words_of(tensor).tobytes()
    return description


@pytest.mark.parametrize("coder", ["raw", "zstd"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_without_a_number_of_motifs_nothing_is_lost(dtype, size, coder):
    tensors = mosaic_tensors(dtype=dtype)
    tensors["noise"] = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors["steps"] = torch.arange(9)
    check_lossless(tensors, f"mosaic:s={size}|{coder}")


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        elements=st.sampled_from([0.0, -0.0, 1.0, 0.1, 2.0**-140, -3e38]),
    ),
    st.integers(1, 5),
)
def test_signed_zeros_subnormals_scalars_and_empty_tensors_come_back(array, size):
    check_lossless({"a": torch.tensor(array), "b": torch.tensor(array).flatten()}, f"mosaic:s={size}|raw")


def network_of_motifs(size: int, motifs: int, scale: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return a network and the bits of its motifs as float32, and of indices of one width."""
    shapes = ((250 * scale, 126), (128, 128 * scale), (64 * scale, 224))
    generator = torch.Generator().manual_seed(size)
    bank = torch.randn(motifs, size, generator=generator)
    tensors, blocks = {}, 0
    for index, shape in enumerate(shapes):
        count = -(-math.prod(shape) // size)
        chosen = torch.randint(0, motifs, (count,), generator=generator)
        tensors[f"w{index}"] = bank[chosen].reshape(-1)[: math.prod(shape)].reshape(shape).clone()
        blocks += count
    return tensors, motifs * size * 32 + blocks * math.log2(motifs)


@pytest.mark.parametrize(("size", "motifs"), [(2, 50), (4, 256), (5, 90), (16, 40)])
def test_the_size_of_blocks_is_found(size, motifs):
    tensors, bits = network_of_motifs(size, motifs, 1)
    assert check_lossless(tensors, "mosaic|entropy").bits < 1.02 * bits + 8 * 200
    told = describe(tensors, f"mosaic:s={size}|entropy")[0].bits
    assert describe(tensors, "mosaic|entropy")[0].bits <= told + 8 * 6


@pytest.mark.parametrize(("size", "motifs"), [(4, 256), (8, 64), (2, 1024)])
@pytest.mark.parametrize("spec", ["mosaic|entropy", "best"])
def test_a_mosaic_of_a_million_weights_is_found_and_costs_what_it_is_worth(size, motifs, spec):
    tensors, bits = network_of_motifs(size, motifs, 16)
    assert sum(tensor.numel() for tensor in tensors.values()) > 950_000
    for name in list(tensors):
        tensors[f"{name}.bias"] = 0.01 * torch.randn(100, generator=torch.Generator().manual_seed(1))
    description = describe(tensors, spec)[0]
    assert description.bits < 1.02 * (bits + 32 * 100 * 3)
    assert description.lossless


def test_a_mosaic_is_found_among_tensors_that_are_none():
    tensors, bits = network_of_motifs(4, 256, 1)
    generator = torch.Generator().manual_seed(0)
    tensors["noise"] = torch.randn(500, 500, generator=generator)
    tensors["levels"] = torch.randint(-7, 8, (300, 300), generator=generator) * 0.125
    rest = sum(describe({name: tensors[name]}, "entropy")[0].bits for name in ("noise", "levels"))
    assert describe(tensors, "mosaic|entropy")[0].bits < 1.02 * (bits + rest)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint32, np.uint64]),
        st.tuples(st.integers(0, 60), st.integers(1, 4)),
        elements=st.sampled_from([0, 1, 2, 0x80000000]),
    )
)
def test_labels_are_those_of_distinct_blocks_in_order(rows):
    labels, counts = label_keys(block_keys(rows))
    order = list(dict.fromkeys(map(bytes, rows)))
    assert labels.tolist() == [order.index(bytes(row)) for row in rows]
    assert counts.tolist() == [sum(bytes(row) == known for row in rows) for known in order]


def test_the_size_of_blocks_is_found_for_each_dtype_together():
    single, _ = network_of_motifs(6, 40, 1)
    tensors = {"a": single["w0"], "b": single["w0"].double() * 0.1}
    assert check_lossless(tensors, "mosaic|entropy").bits_per_weight < 2


def test_a_network_of_motifs_costs_its_motifs_and_the_entropy_of_its_indices():
    tensors = mosaic_tensors(shapes=((400, 100), (100, 64)))
    description = check_lossless(tensors, "mosaic|entropy")
    rows = np.concatenate([tensor.numpy().reshape(-1, 4) for tensor in tensors.values()])
    _, counts = np.unique(rows, axis=0, return_counts=True)
    entropy = float((counts * np.log2(counts.sum() / counts)).sum())
    nominal = (len(counts) - 1) * 4 * 32 + entropy
    assert description.parts["tables"] < (len(counts) - 1) * 4 * 32 + 1000
    assert description.bits - description.parts["structure"] < 1.05 * nominal
    assert description.bits < 0.7 * describe(tensors, "zstd")[0].bits


def test_a_tail_is_the_beginning_of_a_motif():
    whole, cut = mosaic_tensors(shapes=((400,),))["w0"], mosaic_tensors(shapes=((399,),))["w0"]
    assert torch.equal(whole[:399], cut)
    one, other = describe({"w": whole}, "mosaic|raw")[0], check_lossless({"w": cut}, "mosaic|raw")
    assert other.parts["tables"] == one.parts["tables"]


def test_a_tail_that_begins_no_motif_gets_its_own():
    tensor = torch.cat([torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(50), torch.tensor([5.0, 6.0])])
    description = check_lossless({"w": tensor}, "mosaic|raw")
    assert description.parts["payload"] == 8 * 51


@pytest.mark.parametrize("coder", ["raw", "zstd"])
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(lambda g: torch.randn(100, 30, generator=g), id="float32"),
        pytest.param(lambda g: torch.randn(100, 30, generator=g).bfloat16(), id="bfloat16"),
        pytest.param(lambda g: torch.randn(100, 30, generator=g).half(), id="float16"),
        pytest.param(lambda g: torch.randn(100, 30, generator=g).to(torch.float8_e4m3fn), id="float8"),
        pytest.param(lambda g: torch.randn(100, 30, generator=g).double() / 3, id="float64"),
        pytest.param(lambda g: torch.randint(-8, 8, (100, 30), generator=g) * 0.1, id="four bits"),
        pytest.param(
            lambda g: torch.randn(100, 30, generator=g) * (torch.rand(100, 30, generator=g) < 0.05), id="pruned"
        ),
        pytest.param(lambda g: torch.full((100, 30), 0.3), id="constant"),
    ],
)
def test_a_network_that_repeats_no_blocks_costs_few_bytes_more_than_its_words(tensor, coder):
    tensors = {"w": tensor(torch.Generator().manual_seed(0))}
    plain, ours = describe(tensors, coder)[0], check_lossless(tensors, f"mosaic|{coder}")
    names = [len(build_estimator(spec).full_spec) for spec in (f"mosaic|{coder}", coder)]
    assert ours.bits - plain.bits <= 8 * (16 + names[0] - names[1])


def test_words_in_a_wide_dtype_are_coded_in_a_narrow_one():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    narrow_bits = check_lossless({"w": values}, "mosaic|raw").parts["payload"]
    assert check_lossless({"w": values.double()}, "mosaic|raw").parts["payload"] == narrow_bits == 16 * 1000


def test_blocks_are_compared_across_tensors():
    block = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    together = check_lossless({f"w{index}": block[torch.randperm(40)] for index in range(20)}, "mosaic|raw")
    assert together.parts["tables"] <= 40 * 4 * 32 + 100
    assert together.parts["payload"] == 20 * 40 * 8


def test_tensors_in_single_and_double_precision_have_their_own_motifs():
    single = mosaic_tensors(shapes=((400, 20),))["w0"]
    double = mosaic_tensors(shapes=((400, 20),), seed=1, dtype=torch.float64)["w0"] / 3
    description = check_lossless({"a": single, "b": double}, "mosaic|raw")
    assert description.bits < 0.3 * description.raw_bits


def test_blocks_that_share_a_key_are_coded_word_by_word(monkeypatch):
    monkeypatch.setattr(
        "kcomplex.compressors.mosaic.repeated_blocks.block_keys", lambda rows: rows[:, 0].astype(np.uint64)
    )
    tensors = {"w": torch.tensor([[1.0, 2.0], [1.0, 3.0]] * 100), "v": torch.tensor([[4.0, 5.0]] * 100)}
    description = check_lossless(tensors, "mosaic:s=2|raw")
    payload = {tensor.name: tensor.parts["payload"] for tensor in description.tensors}
    assert payload == {"v": 100 * 8, "w": 400 * 8}


@pytest.mark.parametrize("dtype", [*FLOATS[:5]], ids=str)
def test_with_a_number_of_motifs_every_block_is_its_nearest_motif(dtype):
    tensors = {
        "w": torch.randn(60, 31, generator=torch.Generator().manual_seed(0)).to(dtype),
        "v": torch.randn(7, generator=torch.Generator().manual_seed(1)).to(dtype),
    }
    prove(tensors, describe(tensors, "mosaic:s=3,k=20|zstd")[0])
    decoded = decode_checkpoint(encode_checkpoint(tensors, "mosaic:s=3,k=20|zstd"))
    rows = blocks_of([tensor.double().numpy() for tensor in decoded.values()], 3)
    whole = rows.rows[rows.real == 3]
    assert len(np.unique(whole, axis=0)) <= 20


def test_more_motifs_give_less_distortion():
    tensors = {"w": torch.randn(200, 40, generator=torch.Generator().manual_seed(0))}
    distortions = [describe(tensors, f"mosaic:k={k}|raw")[0].distortion for k in (2, 16, 128, 4000)]
    assert distortions == sorted(distortions, reverse=True)
    assert distortions[-1] == 0


def test_a_fit_is_better_than_blocks_drawn_and_close_to_k_means():
    from sklearn.cluster import KMeans

    tensor = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    theirs = KMeans(64, n_init=1, random_state=0).fit(tensor.numpy()).inertia_ / tensor.numel()
    assert describe({"w": tensor}, "mosaic:k=65|raw")[0].distortion < 1.1 * theirs


def test_equal_seeds_give_equal_streams():
    tensors = {"w": torch.randn(100, 8, generator=torch.Generator().manual_seed(0))}
    streams = [encode_checkpoint(tensors, f"mosaic:capacity=0.1,seed={seed}|raw") for seed in (1, 1, 2)]
    assert streams[0] == streams[1] != streams[2]


@pytest.mark.parametrize("spec", ["mosaic|raw", "mosaic:k=2|raw", "mosaic:capacity=0.5|raw"])
def test_networks_without_floats_blocks_or_anything_but_zero_come_back(spec):
    check_lossless({"a": torch.arange(5), "e": torch.zeros(0, 4)}, spec)
    check_lossless({"z": torch.zeros(30), "s": torch.tensor(0.0)}, spec)


def test_one_block_is_not_erased():
    check_lossless({"s": torch.tensor(2.5)}, "mosaic:capacity=0.01|raw")


def test_diverged_weights_are_named():
    tensors = {"good": torch.ones(8), "bad": torch.tensor([1.0, float("nan")])}
    with pytest.raises(WeightsError, match="'bad'"):
        describe(tensors, "mosaic:k=4|raw")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_network_with_nan_and_infinity_loses_nothing(dtype):
    tensors = mosaic_tensors(dtype=dtype)
    words = words_of(tensors["w0"])
    words[:8] = np.resize(np.frombuffer(bytes([255, 127, 1, 255, 128, 248, 240, 124]) * 8, words.dtype), 8)
    words[8:400] = np.resize(words[:4], 392)
    mask = torch.full((40, 40), float("-inf"), dtype=dtype).triu(1) if dtype.itemsize > 1 else torch.zeros(9)
    check_lossless(tensors | {"mask": mask}, "mosaic|entropy")


def test_weights_beyond_single_precision_have_no_motif():
    with pytest.raises(WeightsError, match="1e\\+100"):
        describe({"w": torch.full((8,), 1e100, dtype=torch.float64)}, "mosaic:k=4|raw")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s": 0}, "s must be 1 to 65536"),
        ({"k": 1}, "at least 2"),
        ({"k": 4, "capacity": 0.1}, "exclude each other"),
        ({"capacity": 0.0}, "above 0"),
        ({"capacity": 2.0}, "at most 1"),
        ({"seed": -1}, "negative"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        Mosaic(**options)


@pytest.mark.parametrize("options", ["s=1000000000000,k=4", "s=1000000000000", "s=65537"])
def test_blocks_beyond_any_use_are_refused(options):
    with pytest.raises(SpecError, match="s must be 1 to 65536"):
        build_estimator(f"mosaic:{options}|raw")


def test_the_largest_blocks():
    check_lossless({"w": torch.ones(3, 40)}, "mosaic:s=65536|raw")


@pytest.mark.parametrize("tiny", [5e-324, 4.8e-214, 1e-160])
def test_distances_that_underflow_are_ties(tiny):
    rows, motifs = np.zeros((1, 1)), np.array([[tiny], [0.0]])
    squares = nearest.squared_distances(rows[[0, 0]], motifs)
    assert nearest.nearest(rows, motifs) == np.argmin(squares)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.fixture
def two_blas_threads():
    # In threads that end: the library lets only one living thread change the number.
    with ThreadPoolExecutor(1) as pool:
        limit = pool.submit(threadpool_limits, 2, "blas").result()
    yield
    with ThreadPoolExecutor(1) as pool:
        pool.submit(limit.restore_original_limits).result()


@pytest.mark.usefixtures("two_blas_threads")
def test_searches_in_parallel_leave_the_threads_of_blas_as_they_were():
    random = np.random.default_rng(0)
    motifs = random.normal(size=(64, 8))
    rows = [random.normal(size=(20_000 * (1 + index % 3), 8)) for index in range(12)]
    before = blas_threads()
    assert set(before) == {2}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda blocks: nearest.nearest(blocks, motifs), rows))
        assert blas_threads() == before


@pytest.mark.usefixtures("two_blas_threads")
def test_measuring_in_parallel_leaves_the_threads_of_libraries_as_they_were():
    tensors = {f"w{index}": torch.randn(4000, generator=torch.Generator().manual_seed(index)) for index in range(30)}
    before = threadpool_info()
    describe(tensors, "mosaic:s=8,k=64|entropy", jobs=4)
    assert threadpool_info() == before


def test_specifications_come_back():
    for spec in ("mosaic|raw", "mosaic:s=8,k=64|zstd", "mosaic:capacity=0.05,seed=3|raw"):
        assert build_estimator(spec).spec == spec


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.integers(0, 40), st.integers(1, 4)),
        elements=st.one_of(st.integers(-3, 3).map(float), st.floats(-1e30, 1e30).map(lambda x: float(np.float32(x)))),
    )
)
def test_codebooks_come_back_sorted(rows):
    book = sorted_rows(rows)
    reader = Reader(pack_codebook(book) + b"rest")
    back = unpack_codebook(reader, rows.shape[1], rows.dtype)
    assert back.tobytes() == book.tobytes()
    assert reader.rest() == b"rest"
    assert sorted(map(bytes, book)) == sorted(map(bytes, rows))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_are_stored_no_wider_than_their_dtype(dtype):
    tensor = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = np.float64 if dtype is torch.float64 else np.float32
    values = tensor.to(torch.float64).numpy().astype(wide)
    code, words = narrow(values)
    assert words.dtype.itemsize <= dtype.itemsize
    assert widen(code, words, np.dtype(wide)).tobytes() == values.tobytes()


def fitted():
    tensors = mosaic_tensors(shapes=((40, 10),), motifs=30)
    mosaic = Mosaic()
    shared = mosaic.fit(list(open_weights(tensors).values()))
    return mosaic, shared, mosaic.quantise(tensors["w0"].numpy(), shared)


def test_indices_beyond_the_codebook_are_refused():
    mosaic, shared, quantised = fitted()
    wrong = quantised.symbols.copy()
    wrong[3] = 255
    with pytest.raises(StreamError, match="beyond"):
        mosaic.reconstruct(Quantised(wrong), (40, 10), np.dtype(np.float32), shared)


def test_too_few_indices_are_refused():
    mosaic, shared, quantised = fitted()
    with pytest.raises(StreamError, match="arrays can't be"):
        mosaic.reconstruct(Quantised(quantised.symbols[:-1]), (40, 10), np.dtype(np.float32), shared)


@pytest.mark.parametrize("side", [b"\x07", b"\xff", b"\x06\x06"], ids=repr)
def test_corrupted_side_information_is_refused(side):
    mosaic, shared, quantised = fitted()
    with pytest.raises(StreamError):
        mosaic.reconstruct(Quantised(quantised.symbols, side), (40, 10), np.dtype(np.float32), shared)


def test_words_in_a_stream_of_motifs_only_are_refused():
    words = Quantised(np.zeros(4, np.uint32), b"\x06")
    with pytest.raises(StreamError):
        Mosaic(k=4).reconstruct(words, (4,), np.dtype(np.float32), b"\x00\x00")


def deflated(data):
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(data) + packer.flush()
    return varint(len(packed)) + packed


@pytest.mark.parametrize(
    "shared",
    [
        pytest.param(b"\x00", id="one codebook"),
        pytest.param(b"\x00\x00\x00", id="bytes left over"),
        pytest.param(varint(2) + b"\x06" + bytes(31), id="truncated"),
        pytest.param(varint(2) + b"\x07" + bytes(64) + b"\x00", id="too wide"),
        pytest.param(varint(2) + b"\x55" + bytes(32) + b"\x00", id="unknown dtype"),
        pytest.param(varint(1 << 40) + b"\x86" + deflated(bytes(9)) + b"\x00", id="bomb"),
        pytest.param(varint(2) + b"\x86" + deflated(bytes(31)) + b"\x00", id="too short"),
        pytest.param(varint(2) + b"\x86" + deflated(bytes(33)) + b"\x00", id="too long"),
        pytest.param(varint(2) + b"\x86" + varint(3) + b"\xff\xff\xff\x00", id="not deflate"),
    ],
)
def test_corrupted_codebooks_are_refused(shared):
    with pytest.raises(StreamError):
        Mosaic().reconstruct(Quantised(np.zeros(4, np.uint8)), (4,), np.dtype(np.float32), shared)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_changed_byte_never_ends_in_anything_but_a_stream_error(data):
    stream = bytearray(encode_checkpoint(mosaic_tensors(shapes=((20, 10),), motifs=9), "mosaic|raw"))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_checkpoint(bytes(stream))
    except StreamError:
        return
    assert decoded["w0"].shape == (20, 10)
