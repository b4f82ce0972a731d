"""One pass over a store's samples for several trainings at once, each at its own batch size.

Shape legend: B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import torch

from sam3cache.loading.cached import CachedSamples, epoch_order, split_batches
from sam3cache.records import Batch

_IndicesOf = Callable[[int], Sequence[int] | None]


class JointReading:
    """Reads samples in one order, once an epoch, for all who have joined.

    What has been read is kept until all have had it: they should be asked in turn, who is furthest
    behind first.

    Args:
        samples: what is read; mostly a stream.
        seed: of the order.
        shuffle: whether the order is random.
        with_target: whether targets are read.
        piece_size: samples that are read at a time.
        levels: what is read of them; None for all.
    """

    def __init__(
        self,
        samples: CachedSamples,
        *,
        seed: int = 0,
        shuffle: bool = False,
        with_target: bool = True,
        piece_size: int = 16,
        levels: Sequence[str] | None = None,
    ) -> None:
        self.samples, self.piece_size = samples, piece_size
        self.seed, self.shuffle, self.with_target = seed, shuffle, with_target
        self.levels = levels
        self._members: list[JointMember] = []
        self._passes: dict[int, _Pass] = {}

    def join(self, indices_of: _IndicesOf, *, epoch: int = 1, start: int = 0) -> JointMember:
        """Become one of those who are read for; all join before the first of them reads.

        Args:
            indices_of: by epoch, the samples that are wanted; None for all.
            epoch: the first that is wanted.
            start: samples of that one to pass over.
        """
        member = JointMember(self, indices_of, epoch, start)
        self._members.append(member)
        return member

    def leave(self, member: JointMember) -> None:
        """Keep nothing more for a member."""
        if member in self._members:
            self._members.remove(member)
        for epoch in list(self._passes):
            self._take(epoch, member, None)

    def close(self) -> None:
        """Stop reading ahead."""
        for passing in self._passes.values():
            passing.reader.close()
        self._passes.clear()

    def order_of(self, epoch: int, indices: Sequence[int] | None) -> list[int]:
        """Return some samples in the order of an epoch."""
        return epoch_order(
            len(self.samples), self.seed, epoch, shuffle=self.shuffle, indices=indices
        )

    def batch(self, epoch: int, member: JointMember, indices: Sequence[int]) -> Batch:
        """Return samples that a member comes to, reading as far as that takes."""
        if epoch not in self._passes:
            self._passes[epoch] = self._begin(epoch)
        batch = self._passes[epoch].batch(indices)
        self._take(epoch, member, indices)
        return batch

    def _begin(self, epoch: int) -> _Pass:
        wanted = {
            member: set(self.order_of(epoch, member.indices_of(epoch))[member.start_in(epoch) :])
            for member in self._members
            if member.epoch <= epoch
        }
        indices = sorted(set().union(*wanted.values()))
        order = self.order_of(epoch, indices)
        reader = self.samples.iterate(
            self.piece_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            indices=indices,
            levels=self.levels,
            with_target=self.with_target,
        )
        return _Pass(reader, deque(split_batches(order, self.piece_size)), wanted)

    def _take(self, epoch: int, member: JointMember, indices: Sequence[int] | None) -> None:
        """Note what a member has had (None: all it will have), and drop what nobody waits for."""
        passing = self._passes.get(epoch)
        if passing is None:
            return
        left = passing.wanted.get(member, set())
        left.difference_update(left.copy() if indices is None else indices)
        if not left:
            passing.wanted.pop(member, None)
        if not passing.wanted:
            passing.reader.close()
            del self._passes[epoch]
            return
        passing.pieces = [
            piece
            for piece in passing.pieces
            if any(not left.isdisjoint(piece[0]) for left in passing.wanted.values())
        ]


@dataclass(eq=False)
class JointMember:
    """One of those who are read for; it is asked for batches as ``CachedSamples`` is.

    Attributes:
        reading: which reading it is a member of.
        indices_of: by epoch, the samples that it wants.
        epoch: the first that it wants.
        start: samples of that one which it passes over.
    """

    reading: JointReading
    indices_of: _IndicesOf
    epoch: int
    start: int

    def start_in(self, epoch: int) -> int:
        """Return how many samples of an epoch it passes over."""
        return self.start if epoch == self.epoch else 0

    def iterate(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        indices: Sequence[int] | None = None,
        start: int = 0,
        piece_size: int | None = None,
        levels: Sequence[str] | None = None,
        with_target: bool = True,
    ) -> Generator[Batch]:
        """Go through an epoch as ``CachedSamples.iterate`` does, with the same batches."""
        reading = self.reading
        assert (shuffle, start) == (reading.shuffle, self.start_in(epoch))
        assert not shuffle or seed == reading.seed
        order = reading.order_of(epoch, indices)[start:]
        for chunk in split_batches(order, batch_size, piece_size):
            batch = reading.batch(epoch, self, chunk)
            wanted = batch.levels if levels is None else levels
            yield replace(
                batch,
                levels={level: batch.levels[level] for level in wanted},
                target_BKTT=batch.target_BKTT if with_target else None,
            )

    def leave(self) -> None:
        """Want nothing more."""
        self.reading.leave(self)


@dataclass
class _Pass:
    """An epoch under way.

    Attributes:
        reader: of the pieces.
        to_come: indices of the pieces that are to be read.
        wanted: by member, the samples that it has yet to be given.
        pieces: what has been read and somebody waits for.
        error: what has ended the reading.
    """

    reader: Generator[Batch]
    to_come: deque[Sequence[int]]
    wanted: dict[JointMember, set[int]]
    pieces: list[tuple[Sequence[int], Batch]] = field(default_factory=list)
    error: Exception | None = None

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return some samples, reading until they are there."""
        missing = set(indices).difference(*(piece for piece, _ in self.pieces))
        while missing:
            if self.error is not None:
                raise self.error  # It ended the reading: others who come there meet it, too.
            piece = self.to_come.popleft()
            try:
                self.pieces.append((piece, next(self.reader)))
            except Exception as error:
                self.error = error
                raise
            missing.difference_update(piece)
        for piece, batch in self.pieces:
            if list(piece) == list(indices):
                return batch  # of equal batch sizes, without a copy
        places = {
            index: (batch, position)
            for piece, batch in self.pieces
            for position, index in enumerate(piece)
        }
        return _stack([places[index] for index in indices])


def _stack(places: Sequence[tuple[Batch, int]]) -> Batch:
    """Return a batch of single samples of others."""
    first = places[0][0]
    target_BKTT = None
    if first.target_BKTT is not None:
        targets = [(batch.target_BKTT, at) for batch, at in places]
        target_BKTT = torch.stack([target[at] for target, at in targets if target is not None])
    return Batch(
        levels={
            level: torch.stack([batch.levels[level][at] for batch, at in places])
            for level in first.levels
        },
        angles_B2=torch.stack([batch.angles_B2[at] for batch, at in places]),
        content_B2=torch.stack([batch.content_B2[at] for batch, at in places]),
        target_BKTT=target_BKTT,
        rows=tuple(batch.rows[at] for batch, at in places),
    )
