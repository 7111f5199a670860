"""Which history was erased, so that snapshots can say so; and ids of erased rows, whose events must not come back."""

from alembic import op

revision = "0005"
down_revision = "0004"

STATEMENTS = (
    # Nothing here names who was forgotten.
    """
    CREATE TABLE store.erasures (
        feature_set text NOT NULL,
        known_from timestamptz NOT NULL,
        erased_at timestamptz NOT NULL
    )
    """,
    "ALTER TABLE store.retired_events ADD COLUMN forgotten boolean NOT NULL DEFAULT false",
    "GRANT SELECT ON store.erasures TO mojomesh_service",
)


def upgrade() -> None:
    """Make the table; only the owner erases, so the service role may read it and no more."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Refuse: snapshots would keep quiet about what is gone."""
    raise NotImplementedError("history may have been erased; drop the table by hand if you mean it")
