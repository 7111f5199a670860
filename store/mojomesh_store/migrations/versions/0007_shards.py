"""On how many shards entities are placed, and which rows of a shard are copies that count elsewhere."""

from alembic import op

revision = "0007"
down_revision = "0006"

STATEMENTS = (
    # n_shards: null means as many as are configured. next_n_shards: writers place by this one already, while a shard is being filled.
    # counts_after: rows created until then are copies; they count, in snapshots and segments, on the shard that they were copied from.
    # Infinity: the shard is being filled, and nobody else may write.
    """
    CREATE TABLE store.shard (
        only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        n_shards integer,
        next_n_shards integer,
        counts_after timestamptz NOT NULL DEFAULT '-infinity'
    )
    """,
    "INSERT INTO store.shard DEFAULT VALUES",
    # Entities whose rows were copied to the last of n_shards shards, until none of these rows is left on this one.
    "CREATE TABLE store.moved (entity_id text PRIMARY KEY, n_shards integer NOT NULL)",
    "GRANT SELECT ON store.shard, store.moved TO mojomesh_service",
)


def upgrade() -> None:
    """Make the tables; only the owner moves entities."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Refuse: copies would count twice."""
    raise NotImplementedError("entities may have been moved; drop the tables by hand if you mean it")
