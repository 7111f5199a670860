"""Feature rows, append-only and bitemporal, and the floor that snapshots leave behind."""

from alembic import op

revision = "0001"
down_revision = None

# A plain PostgreSQL has no such role yet; giving it a login and a password is the installation's business. Where the role is
# there, the owner needs no right to make one: PostgreSQL checks that right before it looks whether the name is taken.
SERVICE_ROLE = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mojomesh_service') THEN
        CREATE ROLE mojomesh_service NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;
END
$$
"""

FEATURE_ROWS = """
CREATE SEQUENCE store.feature_row_seq;

CREATE TABLE store.feature_rows (
    feature_set text NOT NULL,
    entity_id text NOT NULL,
    event_time timestamptz NOT NULL,
    reported_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    seq bigint NOT NULL DEFAULT nextval('store.feature_row_seq'),
    event_id uuid NOT NULL,
    "values" jsonb NOT NULL,
    PRIMARY KEY (feature_set, event_time, event_id)
) PARTITION BY LIST (feature_set);

-- Maintenance may give a feature set its own list partition, and that one ranges of event time; until then rows land here.
CREATE TABLE store.feature_rows_other PARTITION OF store.feature_rows DEFAULT PARTITION BY RANGE (event_time);
CREATE TABLE store.feature_rows_other_any PARTITION OF store.feature_rows_other DEFAULT;

-- Reading as of a time, newest first, in the order that decides between rows of one event time.
CREATE INDEX feature_rows_as_of ON store.feature_rows (feature_set, entity_id, event_time DESC, created_at DESC, seq DESC);
CREATE INDEX feature_rows_values ON store.feature_rows USING gin ("values" jsonb_path_ops);
-- Sealing reads what was created since the last watermark; rows lie in that order, so a block range index of a few pages is enough.
CREATE INDEX feature_rows_created ON store.feature_rows USING brin (created_at) WITH (autosummarize = on);
"""

SNAPSHOT_FLOOR = """
CREATE TABLE store.snapshot_floor (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    floor timestamptz NOT NULL
);
INSERT INTO store.snapshot_floor (floor) VALUES ('-infinity');

CREATE FUNCTION store.raise_snapshot_floor(wanted timestamptz) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS 'UPDATE store.snapshot_floor SET floor = greatest(floor, wanted)';
REVOKE ALL ON FUNCTION store.raise_snapshot_floor FROM PUBLIC;
"""

GRANTS = """
GRANT USAGE ON SCHEMA store TO mojomesh_service;
GRANT INSERT, SELECT ON store.feature_rows TO mojomesh_service;
GRANT USAGE ON SEQUENCE store.feature_row_seq TO mojomesh_service;
GRANT SELECT ON store.snapshot_floor TO mojomesh_service;
GRANT EXECUTE ON FUNCTION store.raise_snapshot_floor TO mojomesh_service;
"""


def upgrade() -> None:
    """Create what the feature store is made of."""
    for block in (SERVICE_ROLE, FEATURE_ROWS, SNAPSHOT_FLOOR, GRANTS):
        for statement in [block] if "$$" in block else block.split(";\n"):
            if statement.strip():
                op.execute(statement)


def downgrade() -> None:
    """Refuse: feature rows are kept for ever."""
    raise NotImplementedError("feature rows are never dropped by a migration; drop the schema by hand if you mean it")
