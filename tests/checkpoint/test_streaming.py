"""Slices on their way to a device: in order, one read ahead, errors at their place, nothing left running."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from opdkernels.checkpoint import streaming as feed
from opdkernels.checkpoint.match import open_pair
from tests.analysis.conftest import pair, save  # noqa: F401

HERE = torch.device("cpu")
GB = 10**9


def feeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_items_come_in_order_from_two_slots_in_turn(count):
    found = [(item, ready()) for item, ready in feed.ahead(range(count), lambda item, slot: (item, slot))]
    assert found == [(i, (i, i % 2)) for i in range(count)]
    assert not feeders()


def test_the_next_is_loaded_while_one_is_at_hand_and_no_more():
    loading = {i: threading.Event() for i in range(5)}

    def load(item, slot):
        loading[item].set()
        return item

    flow = feed.ahead(range(5), load)
    for item, ready in flow:
        assert ready() == item
        if item < 4:
            assert loading[item + 1].wait(10)
        time.sleep(0.02)
        assert not any(loading[i].is_set() for i in range(item + 2, 5))


def test_an_error_is_raised_at_its_item_and_the_rest_goes_on():
    def load(item, slot):
        if item in (0, 3):
            raise MemoryError(f"no room for {item}")
        return item

    found = []
    for item, ready in feed.ahead(range(6), load):
        try:
            found.append(ready())
        except MemoryError as error:
            found.append(str(error))
        assert found[item] in (item, f"no room for {item}")
    assert found == ["no room for 0", 1, 2, "no room for 3", 4, 5]


def stop_at(item: int, error: type[BaseException], loaded: list[int]) -> None:
    with contextlib.closing(feed.ahead(range(100), lambda item, slot: loaded.append(item))) as flow:
        for at, ready in flow:
            ready()
            if at == item:
                raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whoever_stops_leaves_no_thread(error):
    loaded: list[int] = []
    with pytest.raises(error):
        stop_at(3, error, loaded)
    assert not feeders()
    assert len(loaded) <= 6


def matches_of(*sizes: int, dtype: str = "bf16") -> list:
    info = SimpleNamespace(dtype=dtype)
    return [(i, SimpleNamespace(numel=n, base=info, trained=info)) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("limit", [1, 1 << 18, 1 << 30])
def test_slices_cover_every_element_once_and_empty_tensors_too(limit):
    sizes = (0, 1, 65_536, 65_537, 200_000)
    found: dict[int, list[tuple[int, int]]] = {}
    for one in feed.cut(matches_of(*sizes), limit):
        found.setdefault(one.index, []).append((one.begin, one.end))
        assert (one.end - one.begin) * 4 <= max(limit, feed.least(matches_of(*sizes)))
    for index, n in enumerate(sizes):
        assert [begin for begin, _ in found[index]] == [0, *(end for _, end in found[index][:-1])]
        assert found[index][-1][1] == n


def test_a_gpu_gets_slices_of_bounded_bytes():
    gpu = torch.device("cuda", 0)
    assert feed.slice_limit(4 * GB, gpu) == feed.LARGEST_SLOT
    assert 3 * feed.slice_limit(64 * 10**6, gpu) <= 32 * 10**6
    assert feed.slice_limit(4 * GB, HERE) == 2 * GB


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.bfloat16)], ids=str)
def test_staged_slices_are_those_of_the_files(tmp_path, io, dtypes):
    """Odd sizes and two dtypes: every side begins aligned in its slot."""
    sides = [{f"w{i}": torch.randn(n).to(dtype) for i, n in enumerate((1, 70_001, 0, 131_073, 5))} for dtype in dtypes]
    paths = [save(tmp_path / name, tensors) for name, tensors in zip("ab", sides, strict=True)]
    with contextlib.closing(open_pair(*paths, io=io)) as opened:
        matches = list(enumerate(opened.matches))
        slices = list(feed.cut(matches, 1))
        assert len(slices) > len(matches)
        for one, ready in feed.staged(opened, slices, feed.least(matches), HERE):
            for side, tensors in zip(ready(), sides, strict=True):
                assert side.data_ptr() % feed.ALIGNED == 0
                assert torch.equal(side, tensors[one.match.name][one.begin : one.end])


class Recorded:
    """Stands in for a stream or an event, and writes down what it is asked."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getattr__(self, what):
        return lambda *arguments: self.log.append((self.name, what, *(getattr(a, "name", "memory") for a in arguments)))


def test_a_slot_is_written_only_once_what_it_held_has_left_and_was_counted(monkeypatch):
    """The order of waits and records of a GPU's slot: the one thing that its memory depends on."""
    log: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Recorded(log, f"current of {device}"))
    slot = feed.Slot(1 << 10, HERE)
    slot.on_gpu, slot.near = True, torch.zeros(1 << 10, dtype=torch.uint8)
    slot.copied, slot.counted = Recorded(log, "copied"), Recorded(log, "counted")
    sides = torch.arange(5.0), torch.arange(3.0).bfloat16()
    found = slot.fill(sides, Recorded(log, "stream"))
    slot.take()
    slot.let_go()
    assert log == [
        ("copied", "synchronize"),
        ("stream", "wait_event", "counted"),
        ("copied", "record", "stream"),
        ("current of cpu", "wait_event", "copied"),
        ("counted", "record", "current of cpu"),
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, sides, strict=True))
    assert found[1].data_ptr() - slot.near.data_ptr() == feed.ALIGNED


def test_a_slice_is_let_go_only_when_the_next_is_asked_for(monkeypatch, tmp_path):
    log: list[str] = []
    monkeypatch.setattr(feed.Slot, "take", lambda slot: log.append("take"))
    monkeypatch.setattr(feed.Slot, "let_go", lambda slot: log.append("let go"))
    paths = [save(tmp_path / name, {"w": torch.ones(200_000)}) for name in "ab"]
    with contextlib.closing(open_pair(*paths)) as opened:
        matches = list(enumerate(opened.matches))
        for _, ready in feed.staged(opened, feed.cut(matches, 1), feed.least(matches), HERE):
            ready()
            log.append("count")
    assert log == ["take", "count", "let go"] * 4
