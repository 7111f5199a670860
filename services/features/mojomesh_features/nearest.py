"""Which entities' vectors are nearest to one, over all shards."""

import asyncio
import heapq

from mojomesh_features.retiring import Retired
from mojomesh_store import embeddings
from mojomesh_store.embeddings import Asked, Near
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

        async def on(shard: Shard) -> list[Near]:
            async with shard.begin() as db:
                return await embeddings.nearest(db, asked, exact)

        found = await asyncio.gather(*(on(shard) for shard in self._feature_store.shards))
        return heapq.nsmallest(asked.k, (near for part in found for near in part), key=lambda near: (near.distance, near.entity_id))
