"""One extraction by several processes: the blocks that each begins with, and how far all are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from sam3cache.extract.worker import BlockTask
from sam3cache.features import Place
from sam3cache.runtime import Rank

_COUNT_INTERVAL_S = 5.0
# Listing a large store on a distant file system shall not take a larger share of the time.
_MAX_COUNT_SHARE = 0.02


def next_blocks(blocks: Sequence[int], rank: Rank, *, claims_work: bool) -> list[int]:
    """Return the blocks that a process turns to now, of those that nobody has done or holds.

    First its own, by their numbers, so that the processes of one launch seldom meet. Then it helps
    with those of others, who may be slow, dead or not there yet: claims keep two from doing one
    block. Where claims do not work, each does its own and no other.

    Args:
        blocks: those that are left.
        rank: of the process.
        claims_work: whether a block can be claimed.
    """
    own = [block for block in blocks if block % rank.num_processes == rank.number]
    if own or not claims_work:
        return own
    # All of them, as the others may never come; those that help together begin elsewhere each.
    begin = len(blocks) * rank.number // rank.num_processes
    return [*blocks[begin:], *blocks[:begin]]


class WholeCount:
    """Counts how many rows of some tasks are done, whoever does them, by their receipts' names.

    Blocks that had a receipt of what they lack (a shard was lost, say) are left out: the old one
    and the new have one name.

    Args:
        root: the store.
        tasks: what was missing when the count began.

    Attributes:
        num_rows: how many rows are counted.
    """

    def __init__(self, root: Place, tasks: Iterable[BlockTask]) -> None:
        self._folder = root / "receipts"
        self._missing: dict[int, tuple[frozenset[str], int]] = {
            task.block: (task.items, len(task.rows)) for task in tasks
        }
        there = self._there()
        for block, (items, _) in list(self._missing.items()):
            if any(block in there[item] for item in items):
                del self._missing[block]
        self.num_rows = sum(num_rows for _, num_rows in self._missing.values())
        self._num_done = 0
        self._due_s = 0.0

    def num_done(self) -> int:
        """Return the number of rows done, as it was some seconds ago at the most."""
        begun_s = time.monotonic()
        if begun_s >= self._due_s:
            there = self._there()
            done = (
                num_rows
                for block, (items, num_rows) in self._missing.items()
                if all(block in there[item] for item in items)
            )
            # Whoever seals the store folds the receipts and takes them away.
            self._num_done = max(self._num_done, sum(done))
            now_s = time.monotonic()
            pause_s = max(_COUNT_INTERVAL_S, (now_s - begun_s) / _MAX_COUNT_SHARE)
            self._due_s = now_s + pause_s
        return self._num_done

    def _there(self) -> Mapping[str, frozenset[int]]:
        items = frozenset[str]().union(*(items for items, _ in self._missing.values()))
        return {
            item: frozenset(int(path.stem) for path in (self._folder / item).glob("*.json"))
            for item in items
        }
