"""Bookkeeping of the delta's paged key-value cache. No torch: a block is a number.

A full block whose ids will not change any more is *published*: other sequences with the same ids from the start on hold
it too instead of computing it again, and when nobody holds it, it is kept until its room is needed. What one sequence
still writes to is its own alone. Running sequences never lose a block; only what nobody holds is evicted.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from cmc_server.errors import CapacityError

#: The mark of an empty beginning.
_START = 0
#: Mark of what lies before a block, and the ids in it: equal keys mean equal ids from the start on.
_Key = tuple[int, tuple[int, ...]]


class BlockPool:
    """A fixed number of blocks of ``block_size`` token positions each.

    Args:
        num_blocks: how many blocks exist.
        block_size: token positions per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        #: Published blocks that nobody holds, the one to evict first at the front.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._published: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}
        #: A number for each key that was ever published; unlike a block's it is never used again.
        self._marks: dict[_Key, int] = {}
        self._next_mark = count(_START + 1)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Of the free blocks, those with a beginning that a new sequence may find."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """Hand out ``count`` blocks to write to; kept ones only if no others are free.

        Raises:
            CapacityError: fewer are free; nothing is taken then.
        """
        if count > self.num_free:
            raise CapacityError(
                f"The delta's key-value cache has {self.num_free} of {self.num_blocks} blocks free, but {count} "
                "are needed; raise --delta-memory or lower --max-delta-seqs."
            )
        blocks = []
        for _ in range(count):
            if not self._free:
                block, _ = self._kept.popitem(last=False)
                self.hide(block)
                self._free.append(block)
            blocks.append(self._free.pop())
            self._holders[blocks[-1]] = 1
        return blocks

    def give_back(self, blocks: Sequence[int]) -> None:
        """Let go of blocks, in the order of their sequence; the last ones are evicted first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "a block was returned twice"
            if not self._holders[block]:
                if block in self._keys:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def find(self, mark: int, ids: tuple[int, ...]) -> tuple[int, int] | None:
        """Hold a published block.

        Args:
            mark: of the beginning before it.
            ids: its own, ``block_size`` of them.

        Returns:
            The block and the mark of the beginning with it; None if there is none.
        """
        key = mark, ids
        block = self._published.get(key)
        if block is None:
            return None
        self._kept.pop(block, None)
        self._holders[block] += 1
        return block, self._marks[key]

    def publish(self, block: int, mark: int, ids: tuple[int, ...]) -> int:
        """Let others find a block that is held and full; the mark of the beginning with it.

        Where the same beginning is published already, this block stays unknown to others.
        """
        key = mark, ids
        if key not in self._published:
            self._published[key] = block
            self._keys[block] = key
            self._marks[key] = next(self._next_mark)
        return self._marks[key]

    def withdraw(self, block: int) -> bool:
        """Make a held block writable again; whether that is possible, since nobody else holds it."""
        if self._holders[block] > 1:
            return False
        self.hide(block)
        return True

    def hide(self, block: int) -> None:
        """Let nobody find a block any more; those who hold it keep it."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._published[key], self._marks[key]


class CachedSequence:
    """The cached positions of one delta input: which blocks hold them, and how many are filled."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        #: Packed, so that the table of a long sequence is copied in one go.
        self.blocks = array("q")
        self.length = 0
        #: Marks of the leading blocks that are published; nothing is written to these.
        self._marks: list[int] = []

    def adopt(self, ids: Sequence[int]) -> None:
        """Hold what is published of the beginning of an input, in place of computing it.

        Does nothing for a sequence that has positions of its own.

        Args:
            ids: the input; at least its last id is left to be fed.
        """
        size = self._pool.block_size
        while self.length == len(self._marks) * size == len(self.blocks) * size and self.length + size < len(ids):
            found = self._pool.find(self._mark, tuple(ids[self.length : self.length + size]))
            if found is None:
                return
            self.blocks.append(found[0])
            self._marks.append(found[1])
            self.length += size

    def publish(self, ids: Sequence[int], num_settled: int) -> None:
        """Let others find the full blocks of what will not change.

        Args:
            ids: the input, at least as long as what is cached.
            num_settled: leading ids that will not change any more.
        """
        size = self._pool.block_size
        for index in range(len(self._marks), min(num_settled, self.length) // size):
            part = tuple(ids[index * size : (index + 1) * size])
            self._marks.append(self._pool.publish(self.blocks[index], self._mark, part))

    def next_block(self, ids: Sequence[int]) -> _Key | None:
        """What the next block of an empty or adopted sequence will hold; None for one with positions of its own."""
        size = self._pool.block_size
        if self.length != len(self._marks) * size or self.length + size >= len(ids):
            return None
        return self._mark, tuple(ids[self.length : self.length + size])

    def truncate(self, length: int) -> None:
        """Roll back to the first ``length`` positions, and free what is not needed for them.

        Fewer are left where the last block would be partly filled and others hold it.
        """
        size = self._pool.block_size
        self.length = min(self.length, length)
        whole, rest = divmod(self.length, size)
        if rest and whole < len(self._marks) and not self._pool.withdraw(self.blocks[whole]):
            self.length = whole * size
        needed = -(-self.length // size)
        self._pool.give_back(self.blocks[needed:])
        del self.blocks[needed:], self._marks[whole:]

    def reserve(self, length: int) -> list[int]:
        """Hold enough blocks for ``length`` positions.

        Returns:
            The blocks that were taken for it.

        Raises:
            CapacityError: the pool has too few free blocks; nothing changes then.
        """
        missing = -(-length // self._pool.block_size) - len(self.blocks)
        taken = self._pool.take(missing) if missing > 0 else []
        self.blocks.extend(taken)
        return taken

    def slots(self, start: int, stop: int) -> list[int]:
        """Where positions ``start`` to ``stop`` lie among all positions of the pool."""
        size = self._pool.block_size
        return [self.blocks[position // size] * size + position % size for position in range(start, stop)]

    def free(self) -> None:
        """Let go of everything."""
        self.truncate(0)

    @property
    def _mark(self) -> int:
        return self._marks[-1] if self._marks else _START
