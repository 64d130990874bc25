"""Calls in CUDA graphs: captured once, replayed without their launches on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree


class NotCapturable(Exception):
    """A call that a CUDA graph cannot capture, and why."""


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextlib.contextmanager
def without_synchronization() -> Iterator[None]:
    """Operations that wait for the GPU raise: in a capture, they would invalidate the state of torch's allocator."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(call: Callable[[], Any], device: torch.device, times: int = 1) -> tuple[Callable[[], None], Any]:
    """Captures calls in a CUDA graph.

    Args:
        call: The call. It runs twice before the capture, so that kernels are compiled and workspaces are allocated.
        device: The GPU; on the CPU, a function that calls again takes the place of the graph.
        times: How many calls the graph has.

    Returns:
        A function that replays the graph, and the result of the last call, which each replay overwrites.

    Raises:
        NotCapturable: The call waits for the GPU, or does something else that a capture forbids.
    """
    if device.type != "cuda":
        return repeat(call, times)
    stream, graph, pool = torch.cuda.Stream(device), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream(device))
    first: Exception | None = None
    result = None
    with torch.cuda.stream(stream):  # also restores the stream after a failed capture, which torch does not
        call()
        try:
            with without_synchronization():
                call()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                try:
                    for _ in range(times):
                        result = call()
                except Exception as error:  # the end of the capture may raise another one
                    first = error
        except Exception as error:
            first = first or error
    if first:
        stream.synchronize()  # what was launched before the error may still use the caller's tensors
        with contextlib.suppress(RuntimeError, AttributeError):  # otherwise the allocator stays in the capture
            torch._C._cuda_endAllocateToPool(device.index, pool)
        if isinstance(first, torch.OutOfMemoryError):
            raise first
        raise NotCapturable(first_line(first)) from first
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay, result


def repeat(call: Callable[[], Any], times: int) -> tuple[Callable[[], None], Any]:
    """What `capture` returns for the CPU."""
    result = call()

    def replay() -> None:
        for _ in range(times):
            latest = call()
        for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(latest), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)

    return replay, result
