"""What scorers made of a model's traffic."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table."""
    for statement in STATEMENTS:
        op.execute(statement)


STATEMENTS = (
    """
    CREATE TABLE registry.followers (
        model text NOT NULL,
        replica text NOT NULL,
        setting integer NOT NULL CHECK (setting > 0),
        followed_at timestamptz NOT NULL,
        left_out jsonb NOT NULL,
        PRIMARY KEY (model, replica)
    )
    """,
    "GRANT SELECT, INSERT, UPDATE ON registry.followers TO mojomesh_service",
)
