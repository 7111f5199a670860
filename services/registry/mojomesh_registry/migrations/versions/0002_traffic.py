"""Challengers and shadows of a model, and what shadows made of the champion's rows."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables; settings are history, and never changed."""
    for statement in STATEMENTS:
        op.execute(statement)


STATEMENTS = (
    """
    CREATE TABLE registry.traffic (
        model text NOT NULL REFERENCES registry.models,
        setting integer NOT NULL CHECK (setting > 0),
        challengers jsonb NOT NULL,
        cause text NOT NULL CHECK (cause IN ('hand', 'promotion')),
        reason text,
        set_at timestamptz NOT NULL,
        PRIMARY KEY (model, setting)
    )
    """,
    """
    CREATE TABLE registry.shadows (
        counter uuid PRIMARY KEY,
        model text NOT NULL,
        n_rows bigint NOT NULL CHECK (n_rows > 0),
        event jsonb NOT NULL
    )
    """,
    "CREATE INDEX shadows_of_model ON registry.shadows (model)",
    "GRANT SELECT, INSERT ON registry.traffic TO mojomesh_service",
    "GRANT SELECT, INSERT, UPDATE ON registry.shadows TO mojomesh_service",
)
