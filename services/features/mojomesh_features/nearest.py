"""Which entities' vectors are nearest to one, over all shards."""

import asyncio
import heapq

from mojomesh_features.retiring import Retired
from mojomesh_store import embeddings
from mojomesh_store.embeddings import Asked, Near
from mojomesh_store.errors import Moved
from mojomesh_store.online import microseconds
from mojomesh_store.shards import FeatureStore, Shard


class Neighbours:
    """Finds them among the rows true at a time."""

    def __init__(self, feature_store: FeatureStore, retired: Retired) -> None:
        self._feature_store = feature_store
        self._retired = retired

    async def nearest(self, asked: Asked, as_known_then: bool, exact: bool) -> list[Near]:
        """The `k` nearest, nearest first.

        Args:
            as_known_then: Whether `asked.snapshot_time` is meant, and not all that is known.

        Raises:
            PermanentError: The snapshot's time is later than now.
            Gone: Rows that were true, or known, then have left PostgreSQL.
            TransientError: A shard is away.
        """
        self._retired.check(asked.feature_set, microseconds(asked.at))
        if as_known_then:
            self._retired.check_known(asked.feature_set, None)
            await self._feature_store.pass_snapshot(asked.snapshot_time)

        n_placed = self._feature_store.n_placed
        try:
            found = await asyncio.gather(*(self._on(shard, n_placed, asked, exact) for shard in self._feature_store.shards))
            if self._feature_store.n_placed != n_placed:
                raise Moved("entities were placed otherwise while some shards had answered")
        except Moved:
            return await self.nearest(asked, as_known_then, exact)
        return heapq.nsmallest(asked.k, (near for part in found for near in part), key=lambda near: (near.distance, near.entity_id))

    async def _on(self, shard: Shard, n_placed: int, asked: Asked, exact: bool) -> list[Near]:
        """The nearest of the entities that have their place on this shard; it may hold copies of others, while entities move."""
        k = asked.k
        while True:
            async with shard.begin() as db:
                found = await embeddings.nearest(db, asked._replace(k=k), exact)
                await self._feature_store.check_reading(db, shard, n_placed)
            own = [near for near in found if self._feature_store.shard_of(near.entity_id) is shard]
            if len(own) >= asked.k or len(found) < k:
                return own
            k *= 2
