"""A function over many tasks in several processes, which never outlive the one that started them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from coconut.types import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_function: Callable[[Any], Any]  # of this worker process


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], n_workers: int) -> Iterator[Result]:
    """Yield ``function(task)`` of every task as they are done, in any order; with one worker, in this process.

    Workers are forked, so `function` may hold anything; tasks and results are pickled.

    Raises:
        DataError: a worker was killed. What `function` raises is raised here, once the tasks in hand are done.
    """
    if n_workers <= 1:
        yield from map(function, tasks)
        return
    # The reading end reports the end of file when the last writing end is gone, which only this process keeps open.
    reading, writing = os.pipe()
    pool = ProcessPoolExecutor(
        n_workers, get_context("fork"), initializer=_start_worker, initargs=(function, reading, writing)
    )
    pending: set[Future[Result]] = set()
    try:
        for task in tasks:
            pending.add(pool.submit(_call, task))
            if len(pending) > 2 * n_workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise DataError("a worker process was killed, perhaps for want of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(reading)
        os.close(writing)


def _start_worker(function: Callable[[Any], Any], reading: int, writing: int) -> None:
    global _function
    _function = function
    os.close(writing)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_die_with_parent, args=(reading,), daemon=True).start()


def _die_with_parent(reading: int) -> None:
    os.read(reading, 1)
    os._exit(1)


def _call(task: Any) -> Any:
    return _function(task)
