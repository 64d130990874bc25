"""safetensors: read exactly as the library reads them; an invalid header is rejected in one line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.checkpoint import base as limits
from opdkernels.checkpoint.io import torch_dtype
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import InputError
from tests.checkpoint.conftest import open_error

pytestmark = pytest.mark.usefixtures("no_guard")

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_slices_are_bit_identical_to_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(7)
    size = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float64: 8}[dtype]
    raw = torch.randint(0, 256, (70_001 * size,), dtype=torch.uint8, generator=random)  # NaN payloads and all
    saved = {
        "long": raw.view(dtype),
        "matrix": torch.randn(31, 33, generator=random).to(dtype),
        "scalar": torch.tensor(1.5, dtype=dtype),
        "one": torch.tensor([-0.0], dtype=dtype),
        "empty": torch.empty(0, 5, dtype=dtype),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(saved, path)
    opened = open_checkpoint(path)
    expected = safetensors.torch.load_file(path)
    assert opened.kind == "safetensors"
    assert set(opened.tensors) == set(expected)
    for name, tensor in expected.items():
        info = opened.tensors[name]
        assert (info.shape, info.numel, info.nbytes) == (tuple(tensor.shape), tensor.numel(), tensor.nbytes)
        cuts = torch.randint(0, info.numel + 1, (20, 2), generator=random).sort(dim=1).values.tolist()
        for start, stop in [[0, info.numel], [info.numel, info.numel], *cuts]:
            part = opened.read(name, start, stop)
            assert part.dtype == dtype
            assert part.dim() == 1
            assert part.is_contiguous()
            assert bits(part) == bits(tensor.reshape(-1)[start:stop])
    opened.close()


def test_tensors_are_in_the_order_of_their_bytes(write_raw: Callable[..., Path]) -> None:
    header = {"z": entry("F32", [1], 4, 8), "a": entry("BF16", [1], 8, 10), "m": entry("F32", [1], 0, 4)}
    assert list(open_checkpoint(write_raw(header, bytes(10))).tensors) == ["m", "z", "a"]


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("io", ["read", "mmap"])
def test_unaligned_data_is_read_aligned(tmp_path: Path, fake_guard: object, io: str, shift: int) -> None:
    values = torch.tensor([1.0, float("nan"), -3.0, 4.5], dtype=torch.float32)
    text = json.dumps({"w": entry("F32", [4], 0, 16)})
    text += " " * ((shift - len(text)) % 8)  # the library pads to 8; the format does not ask for it
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bits(values))
    opened = open_checkpoint(path, io=io)
    for start in range(4):
        part = opened.read("w", start, 4)
        assert part.data_ptr() % 4 == 0
        assert bits(part) == bits(values[start:])
    opened.close()


def test_reads_reuse_one_buffer(write_raw: Callable[..., Path]) -> None:
    opened = open_checkpoint(write_raw({"w": entry("U8", [64], 0, 64)}, bytes(range(64))))
    first = opened.read("w", 0, 64)
    second = opened.read("w", 8, 24)
    assert second.data_ptr() == first.data_ptr()
    assert second.tolist() == list(range(8, 24))


def test_an_element_outside_the_tensor_is_never_read(write_raw: Callable[..., Path]) -> None:
    opened = open_checkpoint(write_raw({"w": entry("F32", [2], 0, 8)}, bytes(8)))
    for start, stop in [(0, 3), (-1, 1), (2, 1)]:
        with pytest.raises(ValueError, match="which has 2"):
            opened.read("w", start, stop)


def test_a_sparse_terabyte_is_read_beyond_2_31_elements(tmp_path: Path) -> None:
    count = 2**39
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": entry("BF16", [2**20, 2**19], 0, 2 * count)}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 2 * count)
        except OSError as error:
            pytest.skip(f"no sparse file of a terabyte here: {error}")
        at = 2**31 + 11
        file.seek(8 + len(header) + 2 * at)
        file.write(b"\x80\x3f")
    opened = open_checkpoint(path)
    assert opened.tensors["w"].numel == count
    assert opened.read("w", at - 1, at + 2).tolist() == [0.0, 1.0, 0.0]
    assert opened.read("w", count - 2, count).tolist() == [0.0, 0.0]


def test_shapes_with_a_product_beyond_64_bits_stay_exact(write_raw: Callable[..., Path]) -> None:
    header = {"a": entry("F32", [2**62, 0], 0, 0), "b": entry("BF16", [0, 2**63, 7], 0, 0), "c": entry("F32", [], 0, 4)}
    opened = open_checkpoint(write_raw(header, bytes(4)))
    assert [(i.numel, i.nbytes) for i in opened.tensors.values()] == [(0, 0), (0, 0), (1, 4)]
    assert opened.tensors["a"].shape == (2**62, 0)
    assert opened.read("a", 0, 0).numel() == 0


def test_hostile_names_are_kept_as_data(write_raw: Callable[..., Path]) -> None:
    names = [
        "",
        "\x1b[31mred",
        "a\nb",
        "../../etc/passwd",
        "<script>alert(1)</script>",
        "=cmd|' /C calc'!A0",
        "\u202eevil",
    ]
    header = {name: entry("BF16", [1], 2 * i, 2 * i + 2) for i, name in enumerate(names)}
    opened = open_checkpoint(write_raw(header, bytes(2 * len(names))))
    assert list(opened.tensors) == names


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x02", "has 1 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "claims 18446744073709551615 bytes"),
        ((99_000_000).to_bytes(8, "little") + b"{}", "99000008 bytes expected, it has 10"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "more than the 100000000"),
        ((3).to_bytes(8, "little") + b"{}", "11 bytes expected, it has 10"),
    ],
    ids=["empty", "one byte", "u64 max", "99 MB claimed", "over the limit", "one short"],
)
def test_wrong_header_lengths_are_rejected(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert says in open_error(path)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "invalid"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, 8, "invalid"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12, "invalid"),
        ({"a": entry("F32", [1], 0, 4)}, 5, "accounts for 73 bytes, it has 74"),
        ({"a": entry("F32", [2], 0, 8)}, 7, "77 bytes expected, it has 76"),
        ({"a": entry("F32", [1], 4, 0)}, 4, "invalid"),
        ({"a": entry("F32", [-1], 0, 4)}, 4, "invalid"),
        ({"a": entry("F32", [1], -4, 0)}, 4, "invalid"),
        ({"a": entry("F32", [3], 0, 4)}, 4, "invalid"),
        ({"a": entry("F32", [2**62, 2**62], 0, 4)}, 4, "invalid"),
        ({"a": entry("F32", [2**62, 4, 1], 0, 0)}, 0, "invalid"),
        ({"a": entry("F31", [1], 0, 4)}, 4, "invalid"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "invalid"),
        ({"a": entry("F32", [1], 0, 2**64)}, 4, "bytes expected"),
        ({"__metadata__": {"a": 1}}, 0, "invalid"),
        ({}, 0, "holds no tensors"),
        ("[]", 0, "invalid"),
        ('{"a":' + "[" * 100_000, 0, "invalid"),
        (b'{"\xff\xfe":1}', 0, "invalid"),
        (b'{"a":NaN}', 0, "invalid"),
    ],
    ids=[
        "overlap",
        "same range",
        "gap",
        "trailing byte",
        "one byte short",
        "reversed",
        "negative shape",
        "negative offset",
        "shape against bytes",
        "product overflow",
        "product wraps to zero",
        "unknown dtype",
        "no offsets",
        "offset of 2^64",
        "metadata not text",
        "no tensors",
        "a list",
        "100,000 deep",
        "not UTF-8",
        "NaN",
    ],
)
def test_invalid_headers_are_rejected(
    write_raw: Callable[..., Path], header: dict[str, object] | bytes | str, data: int, says: str
) -> None:
    assert says in open_error(write_raw(header, bytes(data)))


def test_a_duplicate_key_is_rejected(write_raw: Callable[..., Path]) -> None:
    single_entry = json.dumps(entry("F32", [1], 0, 4))
    assert "key a\\x1b appears twice" in open_error(
        write_raw('{"a\\u001b":' + single_entry + ',"a\\u001b":' + single_entry + "}", bytes(4))
    )
    two = json.dumps(entry("F32", [1], 4, 8))
    open_error(write_raw('{"a":' + single_entry + ',"a":' + two + "}", bytes(8)))


def test_too_many_tensors_are_rejected_before_parsing(
    write_raw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    single_entry = entry("F32", [0], 0, 0)
    assert "200001 tensors" in open_error(write_raw({str(i): single_entry for i in range(limits.MAX_TENSORS + 1)}))


def test_the_fingerprint_is_the_digest_of_the_header(write_raw: Callable[..., Path]) -> None:
    header = {"w": entry("F32", [1], 0, 4)}
    first = open_checkpoint(write_raw(header, bytes(4))).files[0]
    same = open_checkpoint(write_raw(header, b"\x01\x00\x00\x00")).files[0]
    other = open_checkpoint(write_raw({"v": entry("F32", [1], 0, 4)}, bytes(4))).files[0]
    assert first.header_digest == same.header_digest != other.header_digest
    assert len(first.header_digest) == 32
    assert first.bytes == 8 + len(json.dumps(header)) + 4


def or_refused(call: Callable[[], Any]) -> Any:
    """What a call returns, or None where it refuses the file; every other exception is a failure."""
    try:
        return call()
    except InputError as error:
        if not str(error).isprintable():
            raise AssertionError(str(error)) from error
        return None


VALID = safetensors.torch.save(
    {"layers.0.q_proj.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes flipped, inserted or deleted."""
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        last = max(0, len(content) - 1)
        at = draw(st.integers(0, last) | st.integers(max(0, last - 33), last))  # damaged data is a valid file
        change = draw(st.sampled_from(["flip", "insert", "delete", "text"]))
        if change == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif content and change == "delete":
            del content[at : at + draw(st.integers(1, 4))]
        elif content and change == "flip":
            content[at] ^= draw(st.integers(1, 255))
        elif content:
            content[at] = draw(st.sampled_from(b'0123456789[]{},:"'))
    return bytes(content)


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_a_damaged_file_is_read_as_by_the_library_or_rejected(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        with open(path, "wb") as file:
            file.write(content)
        opened = or_refused(lambda: open_checkpoint(path))
        if opened is None:
            return
        expected = safetensors.torch.load(content)
        assert set(opened.tensors) == set(expected)
        for name, info in opened.tensors.items():
            result = or_refused(lambda name=name, info=info: opened.read(name, 0, info.numel))
            assert (result is None) == (torch_dtype(info.dtype) is None)
            assert result is None or bits(result) == bits(expected[name])
        opened.close()


@pytest.mark.parametrize("header", [640, 896, 1152, 1408])
def test_a_header_length_like_a_pickle_signature_is_read(tmp_path, header):
    """640 is 80 02 in little-endian bytes, as a pickle of protocol 2 begins."""
    entry = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(header.to_bytes(8, "little") + entry.ljust(header).encode() + bytes(8))
    source = open_checkpoint(path)
    assert source.read("w", 0, 2).tolist() == [0.0, 0.0]
    source.close()


def test_bits_of_any_dtype_and_the_unchanged_header(write_raw: Callable[..., Path]) -> None:
    """8-bit floats, halves of 16-byte complex numbers, and unaligned elements are integers of their width."""
    data = bytes(range(1, 28))
    path = write_raw(
        {"f": entry("F8_E4M3", [3], 0, 3), "w": entry("BF16", [4], 3, 11), "c": entry("C64", [2], 11, 27)}, data
    )
    source = open_checkpoint(path, any_tensors=True)
    assert source.read_bits("f", 1, 3).tolist() == [2, 3]
    assert bits(source.read_bits("w", 1, 4)) == data[5:11]
    assert source.read_bits("w", 0, 4).dtype == torch.int16
    assert bits(source.read_bits("c", 0, 2)) == data[11:]
    with pytest.raises(ValueError, match="items 0 to 5 of w, which has 4"):
        source.read_bits("w", 0, 5)
    assert source.headers() == {"model.safetensors": path.read_bytes()[: -len(data)]}
    assert (source.folder, source.index) == (str(path.parent), None)
    source.close()
    assert "f8_e4m3" in open_error(path)
