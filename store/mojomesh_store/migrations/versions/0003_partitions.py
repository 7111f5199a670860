"""Partitions made ahead, and rows that leave PostgreSQL once they are sealed and old."""

from alembic import op

revision = "0003"
down_revision = "0002"

# Reads as of an event time before `before` are refused from the announcement on; rows go later, when every reader has heard of it.
# What is left of a row is its id: a replay of its event must not become a correction.
RETIRED = """
CREATE TABLE store.retired (
    feature_set text PRIMARY KEY,
    before timestamptz NOT NULL,
    announced_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE store.retired_events (
    feature_set text NOT NULL,
    event_time timestamptz NOT NULL,
    event_id uuid NOT NULL,
    PRIMARY KEY (feature_set, event_time, event_id)
);
GRANT SELECT ON store.retired, store.retired_events TO mojomesh_service;
"""

# The service role may call these and no more: they add partitions, and take away only what is sealed and what no read at or after `before`
# needs.
ADD_PARTITIONS = """
CREATE FUNCTION store.add_partitions(wanted text, months integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    own text := 'feature_rows_' || left(wanted, 36) || '_' || left(md5(wanted), 6);
    month timestamptz;
    taken boolean;
BEGIN
    IF to_regclass(format('store.%I', own)) IS NULL THEN
        IF EXISTS (SELECT FROM store.feature_rows_other WHERE feature_set = wanted) THEN
            RETURN;  -- they would have to be moved while nobody writes
        END IF;
        EXECUTE format('CREATE TABLE store.%I PARTITION OF store.feature_rows FOR VALUES IN (%L) PARTITION BY RANGE (event_time)',
            own, wanted);
        EXECUTE format('CREATE TABLE store.%I PARTITION OF store.%I DEFAULT', own || '_any', own);
    END IF;
    FOR month IN SELECT generate_series(date_trunc('month', now()), now() + make_interval(months => months), interval '1 month') LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM store.%I WHERE event_time >= %L AND event_time < %L)', own || '_any', month,
            month + interval '1 month') INTO taken;
        IF NOT taken THEN
            EXECUTE format('CREATE TABLE IF NOT EXISTS store.%I PARTITION OF store.%I FOR VALUES FROM (%L) TO (%L)',
                own || to_char(month, '_YYYYMM'), own, month, month + interval '1 month');
        END IF;
    END LOOP;
END
$$
"""

ANNOUNCE = """
CREATE FUNCTION store.announce_retirement(wanted text, wanted_before timestamptz) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO store.retired (feature_set, before) VALUES (wanted, wanted_before)
    ON CONFLICT (feature_set) DO UPDATE SET before = excluded.before, announced_at = clock_timestamp()
    WHERE retired.before < excluded.before
$$
"""

RETIRE = """
CREATE FUNCTION store.retire(wanted text, grace interval) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    own text := 'feature_rows_' || left(wanted, 36) || '_' || left(md5(wanted), 6);
    horizon timestamptz := (SELECT before FROM store.retired WHERE feature_set = wanted AND announced_at <= clock_timestamp() - grace);
    sealed timestamptz := (SELECT max(created_until) FROM store.segments WHERE feature_set = wanted);
    part name;
    n bigint;
    gone bigint := 0;
BEGIN
    IF horizon IS NULL OR sealed IS NULL THEN
        RETURN 0;
    END IF;
    FOR part IN
        SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = to_regclass(format('store.%I', own)) AND relname ~ '_[0-9]{6}$'
            AND to_timestamp(right(relname, 6), 'YYYYMM') + interval '1 month' <= horizon
    LOOP
        EXECUTE format('LOCK TABLE store.%I IN ACCESS EXCLUSIVE MODE', part);
        EXECUTE format('SELECT count(*) FROM store.%I WHERE created_at > %L', part, sealed) INTO n;
        CONTINUE WHEN n > 0;
        EXECUTE format('ALTER TABLE store.%I DETACH PARTITION store.%I', own, part);
        EXECUTE format('INSERT INTO store.feature_rows SELECT DISTINCT ON (entity_id) * FROM store.%I
            ORDER BY entity_id, event_time DESC, created_at DESC, seq DESC', part);
        EXECUTE format('INSERT INTO store.retired_events SELECT feature_set, event_time, event_id FROM store.%I AS old
            WHERE NOT EXISTS (SELECT FROM store.feature_rows AS kept WHERE (kept.feature_set, kept.event_time, kept.event_id)
                = (old.feature_set, old.event_time, old.event_id))', part);
        GET DIAGNOSTICS n = ROW_COUNT;
        gone := gone + n;
        EXECUTE format('DROP TABLE store.%I', part);
    END LOOP;
    WITH old AS (
        DELETE FROM store.feature_rows AS row
        WHERE feature_set = wanted AND event_time < horizon AND created_at <= sealed AND EXISTS (
            SELECT FROM store.feature_rows AS later
            WHERE later.feature_set = wanted AND later.entity_id = row.entity_id AND later.event_time < horizon
                AND (later.event_time, later.created_at, later.seq) > (row.event_time, row.created_at, row.seq)
        )
        RETURNING feature_set, event_time, event_id
    )
    INSERT INTO store.retired_events SELECT * FROM old;
    GET DIAGNOSTICS n = ROW_COUNT;
    RETURN gone + n;
END
$$
"""

GRANTS = """
REVOKE ALL ON FUNCTION store.add_partitions, store.announce_retirement, store.retire FROM PUBLIC;
GRANT EXECUTE ON FUNCTION store.add_partitions, store.announce_retirement, store.retire TO mojomesh_service;
"""


def upgrade() -> None:
    """Create the tables and functions of partition maintenance."""
    for block in (RETIRED, ADD_PARTITIONS, ANNOUNCE, RETIRE, GRANTS):
        for statement in [block] if "$$" in block else block.split(";\n"):
            if statement.strip():
                op.execute(statement)


def downgrade() -> None:
    """Refuse: without the ids of retired rows their events would be stored anew."""
    raise NotImplementedError("rows may have been retired; drop the tables by hand if you mean it")
