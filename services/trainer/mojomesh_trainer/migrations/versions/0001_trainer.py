"""Training runs."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the table; the service role may change runs, but not delete them."""
    for statement in STATEMENTS:
        op.execute(statement)


STATEMENTS = (
    """
    CREATE TABLE trainer.runs (
        run_id uuid PRIMARY KEY,
        model text NOT NULL,
        cause jsonb NOT NULL,
        state text NOT NULL CHECK (state IN ('waiting', 'running', 'announcing', 'succeeded', 'failed', 'skipped')),
        reason text,
        stage text,
        snapshot_time timestamptz,
        tries integer NOT NULL,
        fold_runner text,
        pipeline_run text,
        bundle_digest text,
        announced jsonb NOT NULL,
        leased_by text,
        leased_until timestamptz,
        created_at timestamptz NOT NULL,
        started_at timestamptz,
        ended_at timestamptz
    )
    """,
    "CREATE INDEX runs_newest ON trainer.runs (model, created_at DESC)",
    "CREATE INDEX runs_open ON trainer.runs (created_at) WHERE state IN ('waiting', 'running', 'announcing')",
    "GRANT USAGE ON SCHEMA trainer TO mojomesh_service",
    "GRANT SELECT, INSERT, UPDATE ON trainer.runs TO mojomesh_service",
)
