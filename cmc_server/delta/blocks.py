"""Bookkeeping of the delta's paged key-value cache. No torch: a block is a number."""

from __future__ import annotations

from cmc_server.errors import CapacityError


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

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out ``count`` blocks.

        Raises:
            CapacityError: fewer are free; nothing is taken then.
        """
        if count > len(self._free):
            raise CapacityError(
                f"The delta's key-value cache has {len(self._free)} of {self.num_blocks} blocks free, but {count} "
                "are needed; raise --delta-memory or lower --max-delta-seqs."
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks taken before."""
        self._free.extend(blocks)
        assert len(self._free) <= self.num_blocks, "a block was returned twice"


class CachedSequence:
    """The cached positions of one delta input: which blocks hold them, and how many are filled."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.blocks: list[int] = []
        self.length = 0

    def truncate(self, length: int) -> None:
        """Roll back to the first ``length`` positions and free what is not needed for them."""
        self.length = min(self.length, length)
        needed = -(-self.length // self._pool.block_size)
        self._pool.give_back(self.blocks[needed:])
        del self.blocks[needed:]

    def reserve(self, length: int) -> None:
        """Hold enough blocks for ``length`` positions.

        Raises:
            CapacityError: the pool has too few free blocks; nothing changes then.
        """
        missing = -(-length // self._pool.block_size) - len(self.blocks)
        if missing > 0:
            self.blocks += self._pool.take(missing)

    def free(self) -> None:
        """Give everything back."""
        self.truncate(0)
