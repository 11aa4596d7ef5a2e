"""Ordered parallel map over chunks, in processes: Python code does not run in parallel threads."""

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
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    function: Callable[[Given], Found],
    chunks: Iterable[Given],
    *,
    workers: int = 0,
    start: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Found]:
    """Apply `function` to each chunk and yield the results in order.

    At most a few chunks per worker are in flight, so memory is bounded.

    Args:
        workers: processes; 0 is one per core. A single chunk or a single worker runs in this process.
        start, arguments: initializer of each process, and its arguments.
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
    # A process with threads of torch or of a tokenizer must not be forked.
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
