"""Staging: items arrive in order, one loaded ahead, errors at their item, no thread left, buffers safe to reuse."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from opdkernels.backends import staging

CPU = torch.device("cpu")


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_items_arrive_in_order_from_two_alternating_buffers(count):
    loaded = [(item, result()) for item, result in staging.prefetch(range(count), lambda item, buffer: (item, buffer))]
    assert loaded == [(i, (i, i % 2)) for i in range(count)]
    assert not prefetch_threads()


def test_exactly_one_item_is_loaded_ahead():
    loading = {i: threading.Event() for i in range(5)}

    def load(item, buffer):
        loading[item].set()
        return item

    for item, result in staging.prefetch(range(5), load):
        assert result() == item
        if item < 4:
            assert loading[item + 1].wait(600)
        time.sleep(0.02)
        assert not any(loading[i].is_set() for i in range(item + 2, 5))


def test_an_error_is_raised_at_its_item_and_the_others_load():
    def load(item, buffer):
        if item in (0, 3):
            raise MemoryError(f"no memory for {item}")
        return item

    results = []
    for item, result in staging.prefetch(range(6), load):
        try:
            results.append(result())
        except MemoryError as error:
            results.append(str(error))
        assert results[item] in (item, f"no memory for {item}")
    assert results == ["no memory for 0", 1, 2, "no memory for 3", 4, 5]


def stop_at(stop: int, error: type[BaseException], loaded: list[int]) -> None:
    with contextlib.closing(staging.prefetch(range(100), lambda item, buffer: loaded.append(item))) as flow:
        for item, result in flow:
            result()
            if item == stop:
                raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_survives_an_early_stop(error):
    loaded: list[int] = []
    with pytest.raises(error):
        stop_at(3, error, loaded)
    assert not prefetch_threads()
    assert len(loaded) <= 6


class Recorder:
    """Stands in for a stream or an event and logs its calls."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getattr__(self, method):
        return lambda *args: self.log.append((self.name, method, *(getattr(a, "name", "memory") for a in args)))


def test_a_buffer_is_overwritten_only_after_it_was_copied_and_consumed(monkeypatch):
    """The order of waits and records, on which the buffer's memory depends."""
    log: list[tuple] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Recorder(log, f"current of {device}"))
    buffer = staging.StagingBuffer(1 << 10, CPU)
    buffer.on_gpu, buffer.device_buf = True, torch.zeros(1 << 10, dtype=torch.uint8)
    buffer.copied, buffer.consumed = Recorder(log, "copied"), Recorder(log, "consumed")
    tensors = torch.arange(5.0), torch.arange(3.0).bfloat16()
    views = buffer.fill(tensors, Recorder(log, "stream"))
    buffer.acquire()
    buffer.release()
    assert log == [
        ("copied", "synchronize"),
        ("stream", "wait_event", "consumed"),
        ("copied", "record", "stream"),
        ("current of cpu", "wait_event", "copied"),
        ("consumed", "record", "current of cpu"),
    ]
    assert all(torch.equal(a, b) for a, b in zip(views, tensors, strict=True))
    assert views[1].data_ptr() - buffer.device_buf.data_ptr() == staging.ALIGNMENT


def test_a_buffer_is_released_when_the_next_item_is_requested(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(staging.StagingBuffer, "acquire", lambda buffer: log.append("acquire"))
    monkeypatch.setattr(staging.StagingBuffer, "release", lambda buffer: log.append("release"))
    for _, tensors in staging.stage_to_device(range(4), lambda item: [torch.full((9,), float(item))], 36, 1, CPU):
        tensors()
        log.append("count")
    assert log == ["acquire", "count", "release"] * 4
