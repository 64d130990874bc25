"""Staging of tensors on a device: a thread loads the next item while the current one is in use.

For a GPU, items go through two pairs of pinned host memory and device memory in turn, copied on a separate stream.
On the CPU the same code runs without pinning and streams.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

NUM_BUFFERS = 2
ALIGNMENT = 64  # bytes, of each tensor in a buffer
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def prefetch(items: Iterable[Item], load: Callable[[Item, int], Loaded]) -> Iterator[tuple[Item, Callable[[], Loaded]]]:
    """Load items one ahead, in a thread.

    Args:
        items: What to load, in order.
        load: `load(item, buffer)` loads an item into one of NUM_BUFFERS buffers; a buffer is reused once the iteration
            has moved past its item.

    Yields:
        Each item, and a call that waits for its result and raises what `load` raised.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending: deque = deque()
        try:
            for number, item in enumerate(items):
                pending.append((item, pool.submit(load, item, number % NUM_BUFFERS)))
                if len(pending) == NUM_BUFFERS:
                    first, future = pending.popleft()
                    yield first, future.result
            for last, future in pending:
                yield last, future.result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class StagingBuffer:
    """Host and device memory for the tensors of one item, and events that tell when each may be reused."""

    def __init__(self, nbytes: int, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.host_buf = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.on_gpu)
        self.device_buf = torch.empty(nbytes, dtype=torch.uint8, device=device) if self.on_gpu else self.host_buf
        self.copied: Any = torch.cuda.Event() if self.on_gpu else None  # host to device, on the copy stream
        self.consumed: Any = torch.cuda.Event() if self.on_gpu else None  # by the stream that used the tensors

    def fill(self, tensors: Sequence[torch.Tensor], stream: Any) -> tuple[torch.Tensor, ...]:
        """Views of the device memory that hold 1-D tensors once `stream` has copied them."""
        if self.on_gpu:
            self.copied.synchronize()  # the host memory is free once its last copy is done
        views, start = [], 0
        for tensor in tensors:
            self.host_buf[start : start + tensor.nbytes].view(tensor.dtype).copy_(tensor)
            views.append(self.device_buf[start : start + tensor.nbytes].view(tensor.dtype))
            start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self.on_gpu:
            stream.wait_event(self.consumed)
            with torch.cuda.stream(stream):
                self.device_buf[:start].copy_(self.host_buf[:start], non_blocking=True)
                self.copied.record(stream)
        return tuple(views)

    def acquire(self) -> None:
        """Make the current stream wait for the copy."""
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def release(self) -> None:
        """Make the next copy wait for the work that the current stream has queued."""
        if self.on_gpu:
            self.consumed.record(torch.cuda.current_stream(self.device))


def stage_to_device(
    items: Iterable[Item],
    read: Callable[[Item], Sequence[torch.Tensor]],
    nbytes: int,
    num_tensors: int,
    device: torch.device,
) -> Iterator[tuple[Item, Callable[[], tuple[torch.Tensor, ...]]]]:
    """Read items one ahead and copy them to a device while the one before is in use.

    Args:
        items: What to read, in order.
        read: Reads the 1-D tensors of an item, on the CPU.
        nbytes: The most bytes of an item.
        num_tensors: The most tensors of an item.
        device: Where the tensors are staged.

    Yields:
        Each item, and a call that returns its tensors on the device, valid until the next item, and raises what `read`
        raised.
    """
    on_gpu = device.type == "cuda"
    stream: Any = torch.cuda.Stream(device) if on_gpu else None
    buffers: dict[int, StagingBuffer] = {}

    def load(item: Item, number: int) -> tuple[StagingBuffer, tuple[torch.Tensor, ...]]:
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            if number not in buffers:
                buffers[number] = StagingBuffer(nbytes + num_tensors * ALIGNMENT, device)
            buffer = buffers[number]
            return buffer, buffer.fill(read(item), stream)

    with contextlib.closing(prefetch(items, load)) as flow:  # type: ignore[type-var]
        for item, result in flow:
            acquired: list[StagingBuffer] = []

            def tensors(
                result: Callable[[], tuple[StagingBuffer, tuple[torch.Tensor, ...]]] = result,
                acquired: list[StagingBuffer] = acquired,
            ) -> tuple[torch.Tensor, ...]:
                buffer, views = result()
                acquired.append(buffer)
                buffer.acquire()
                return views

            yield item, tensors
            for buffer in acquired:
                buffer.release()
