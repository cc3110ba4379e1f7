"""What the preprocessing scripts share: a first reading of all episodes, the split, and work in order.

Episodes are read twice, first for what decides (labels, scores), then for the frames chosen. So memory holds
a few of them, however many there are.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from common.runtime import UserError

Outline = TypeVar("Outline")  # an episode without its pixels, with its `path`


def survey(
    read: Callable[[Path], Outline | UserError], paths: list[Path], skip_bad: bool, num_threads: int
) -> tuple[list[Outline], list[str]]:
    """Outlines of usable episodes, complaints about the others.

    `read` returns its complaint about a file. Without `skip_bad` the first one is raised, and so is the case
    that none is usable.
    """
    outlines, bad = [], []
    results = map_in_order(read, paths, num_threads)
    for result in tqdm(results, "labels", len(paths), unit="ep", disable=None):
        if not isinstance(result, UserError):
            outlines.append(result)
        elif skip_bad:
            bad.append(str(result))
        else:
            raise UserError(f"{result}. Mend or remove the file, or go on without it: --skip-bad")
    if not outlines:
        raise UserError(f"none of the {len(bad)} episodes is of use; the first: {bad[0]}")
    return outlines, bad


def check_alike(outlines: list[Outline], traits: dict[str, Callable[[Outline], Any]]) -> None:
    """UserError naming two episodes that differ in one of the traits (name in words -> how to get it)."""
    first = outlines[0]
    for name, trait in traits.items():
        for other in outlines[1:]:
            if trait(first) != trait(other):
                raise UserError(
                    f"{name} differ, preprocess them apart: {first.path} has {trait(first)}, {other.path} "
                    f"has {trait(other)}"
                )


def split_episodes(has_success: np.ndarray, val_split: float, rng: np.random.Generator) -> np.ndarray:
    """(num_episodes,) bool, true for val: the same fraction of episodes with and without success.

    Each of these two groups gives at least one episode to either side, if it has two.
    """
    is_val = np.zeros(len(has_success), dtype=bool)
    for group in (np.flatnonzero(has_success), np.flatnonzero(~has_success)):
        num_val = min(max(1, round(len(group) * val_split)), len(group) - 1)
        is_val[rng.permutation(group)[: max(0, num_val)]] = True
    return is_val


def map_in_order(function: Callable, items: Iterable, num_threads: int) -> Iterator:
    """`map(function, items)` in threads, with at most two results per thread waiting.

    Threads, because what can be saved is waiting for the disk, and frames would have to be copied out of
    processes. One thread is this one: another would only pass the interpreter lock to and fro.
    """
    if num_threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def keep_freed_memory() -> None:
    """Let the memory of one episode serve the next, which glibc would give back to the system in between.

    How much it keeps follows the largest block freed so far (mallopt(3), "dynamic mmap threshold"). Without
    this, page faults cost 40 % of the run. With another libc it does nothing.
    """
    np.empty(16 * 2**20, dtype=np.uint8)
