"""Chunks of work over all cores, in order. Processes, for Python's own work does not spread over threads."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    function: Callable[[Given], Found],
    chunks: Iterable[Given],
    *,
    workers: int = 0,
    start: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Found]:
    """`function` of each chunk, in order; a few chunks a worker are under way at a time, so memory stays bounded.

    Args:
        workers: processes; 0 takes one a core. A single chunk, or one worker, is done in this process.
        start, arguments: called once in every process before its first chunk.
    """
    workers = workers or cores()
    rest = iter(chunks)
    first = list(itertools.islice(rest, 2))
    if len(first) < 2 or workers == 1:
        if start is not None:
            start(*arguments)
        yield from map(function, itertools.chain(first, rest))
        return
    waiting: deque[Future[Found]] = deque()
    # Spawned: a process with threads of torch or of a tokenizer must not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start, initargs=arguments) as pool:
        try:
            for chunk in itertools.chain(first, rest):
                waiting.append(pool.submit(function, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
