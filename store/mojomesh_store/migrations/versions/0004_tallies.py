"""What came in of feature sets that something is expected of, counted where and when their rows are stored."""

from alembic import op

revision = "0004"
down_revision = "0003"

STATEMENTS = (
    """
    CREATE TABLE store.tallies (
        feature_set text NOT NULL,
        created_at timestamptz NOT NULL,
        n_rows bigint NOT NULL,
        n_held bigint NOT NULL,
        newest_event_time timestamptz,
        missing jsonb NOT NULL,
        odd jsonb NOT NULL
    )
    """,
    "CREATE INDEX tallies_in_order ON store.tallies (feature_set, created_at)",
    # They are counts, no facts: once a window is judged, those it was judged by may go.
    "GRANT SELECT, INSERT, DELETE ON store.tallies TO mojomesh_service",
)


def upgrade() -> None:
    """Create the table."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Drop it: what is not judged yet never will be."""
    op.execute("DROP TABLE store.tallies")
