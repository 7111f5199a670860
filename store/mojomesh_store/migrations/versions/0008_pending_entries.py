"""Emptying GIN's lists of pending entries beside the writers."""

from alembic import op

revision = "0008"
down_revision = "0007"

# Only the owner of an index may do it, and one at a time is enough. A partition may leave meanwhile, and its index with it.
EMPTY = """
CREATE FUNCTION store.empty_pending_lists() RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part regclass;
    pages bigint := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('mojomesh.pending')) THEN
        RETURN 0;
    END IF;
    FOR part IN SELECT relid FROM pg_partition_tree(to_regclass('store.feature_rows_values')) WHERE isleaf LOOP
        BEGIN
            pages := pages + gin_clean_pending_list(part);
        EXCEPTION WHEN internal_error OR undefined_table THEN
            NULL;
        END;
    END LOOP;
    RETURN pages;
END
$$
"""


def upgrade() -> None:
    """Create the function."""
    op.execute(EMPTY)
    op.execute("REVOKE ALL ON FUNCTION store.empty_pending_lists FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION store.empty_pending_lists TO mojomesh_service")


def downgrade() -> None:
    """Drop it: writers empty the lists themselves."""
    op.execute("DROP FUNCTION store.empty_pending_lists")
