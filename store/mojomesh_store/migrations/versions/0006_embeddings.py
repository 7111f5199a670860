"""Vectors beside the rows, a partition and an HNSW index for each feature that is one."""

from alembic import op

revision = "0006"
down_revision = "0005"

# pgvector is for the superuser to install; where it is, this changes nothing.
EMBEDDINGS = (
    "CREATE EXTENSION IF NOT EXISTS vector",
    """
    CREATE TABLE store.embeddings (
        feature text NOT NULL,
        entity_id text NOT NULL,
        event_time timestamptz NOT NULL,
        created_at timestamptz NOT NULL,
        seq bigint NOT NULL,
        event_id uuid NOT NULL,
        embedding vector NOT NULL,
        PRIMARY KEY (feature, event_time, event_id)
    ) PARTITION BY LIST (feature)
    """,
    # What each partition was made with, for who makes it elsewhere.
    "CREATE TABLE store.embedded (feature text PRIMARY KEY, dimensions integer NOT NULL, operators text NOT NULL)",
    "CREATE INDEX embeddings_of_entity ON store.embeddings (feature, entity_id)",
    # The service role may call it when the first vector of a feature comes; `feature` is `set.feature`.
    """
    CREATE FUNCTION store.add_embeddings(wanted text, dimensions integer, operators text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    DECLARE
        own text := 'embeddings_' || left(replace(wanted, '.', '_'), 30) || '_' || left(md5(wanted), 6);
    BEGIN
        IF to_regclass(format('store.%I', own)) IS NOT NULL THEN
            RETURN;
        END IF;
        PERFORM pg_advisory_xact_lock(hashtext('mojomesh.embeddings'));
        EXECUTE format('CREATE TABLE IF NOT EXISTS store.%I PARTITION OF store.embeddings FOR VALUES IN (%L)', own, wanted);
        EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON store.%I USING hnsw ((embedding::vector(%s)) %I)',
            own || '_near', own, dimensions, operators);
        INSERT INTO store.embedded VALUES (wanted, dimensions, operators) ON CONFLICT DO NOTHING;
    END
    $$
    """,
    "REVOKE ALL ON FUNCTION store.add_embeddings FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION store.add_embeddings TO mojomesh_service",
    "GRANT SELECT, INSERT ON store.embeddings TO mojomesh_service",
)


def upgrade() -> None:
    """Create the table and the function."""
    for statement in EMBEDDINGS:
        op.execute(statement)


def downgrade() -> None:
    """Refuse: vectors are nowhere else."""
    raise NotImplementedError("vectors are kept for ever; drop the table by hand if you mean it")
