"""The manifest of sealed segments: which rows are in which file."""

from alembic import op

revision = "0002"
down_revision = "0001"

# `follows` chains the segments of a feature set, so that no row can be in none or in two of them: one is the first, each other begins
# where one ends, and no two begin at the same place.
SEGMENTS = """
CREATE TABLE store.segments (
    feature_set text NOT NULL,
    follows timestamptz,
    created_until timestamptz NOT NULL CHECK (created_until > follows),
    path text NOT NULL,
    columns jsonb NOT NULL,
    n_rows bigint NOT NULL,
    n_tied bigint NOT NULL,
    sum_of_seqs bigint NOT NULL,
    first_event_time timestamptz NOT NULL,
    last_event_time timestamptz NOT NULL,
    sealed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (feature_set, created_until),
    UNIQUE NULLS NOT DISTINCT (feature_set, follows),
    FOREIGN KEY (feature_set, follows) REFERENCES store.segments (feature_set, created_until)
);
GRANT INSERT, SELECT ON store.segments TO mojomesh_service;
"""


def upgrade() -> None:
    """Create the manifest."""
    for statement in SEGMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)


def downgrade() -> None:
    """Refuse: what is sealed may be nowhere else."""
    raise NotImplementedError("the manifest says where history is; drop it by hand if you mean it")
