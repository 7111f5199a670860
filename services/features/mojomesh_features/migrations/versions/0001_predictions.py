"""The prediction log, and the drift windows and alerts counted from it."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables; the service role may add to them and change nothing."""
    for statement in STATEMENTS:
        op.execute(statement)


STATEMENTS = (
    """
    CREATE TABLE features.predictions (
        prediction_id uuid PRIMARY KEY,
        seq bigint GENERATED ALWAYS AS IDENTITY,
        model text NOT NULL,
        version integer NOT NULL,
        bundle_digest text NOT NULL,
        replica text NOT NULL,
        entity_id text,
        event_time timestamptz NOT NULL,
        made_at timestamptz NOT NULL,
        inputs double precision[] NOT NULL,
        scores double precision[] NOT NULL,
        rows jsonb NOT NULL,
        request_id uuid
    )
    """,
    "CREATE UNIQUE INDEX predictions_of_model ON features.predictions (model, seq)",
    # Which predictions drift is counted on: of each entity and event_time the first of the version that was champion then.
    """
    CREATE TABLE features.counted (
        model text NOT NULL,
        entity_id text NOT NULL,
        event_time timestamptz NOT NULL,
        promotion integer NOT NULL,
        arrival bigint NOT NULL,
        prediction_id uuid NOT NULL,
        PRIMARY KEY (model, entity_id, event_time)
    )
    """,
    "CREATE UNIQUE INDEX counted_in_order ON features.counted (model, promotion, arrival)",
    """
    CREATE TABLE features.drift_windows (
        model text NOT NULL,
        promotion integer NOT NULL,
        number integer NOT NULL,
        version integer NOT NULL,
        bundle_digest text NOT NULL,
        first_arrival bigint NOT NULL,
        last_arrival bigint NOT NULL,
        window_from timestamptz NOT NULL,
        window_to timestamptz NOT NULL,
        middle timestamptz NOT NULL,
        columns jsonb NOT NULL,
        counted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (model, promotion, number)
    )
    """,
    """
    CREATE TABLE features.alerts (
        event_id uuid PRIMARY KEY,
        model text NOT NULL,
        promotion integer NOT NULL,
        number integer NOT NULL,
        middle timestamptz NOT NULL,
        caused_by uuid NOT NULL,
        event jsonb NOT NULL,
        UNIQUE (model, promotion, number)
    )
    """,
    "CREATE INDEX alerts_by_cause ON features.alerts (caused_by)",
    "GRANT USAGE ON SCHEMA features TO mojomesh_service",
    "GRANT SELECT, INSERT ON features.predictions, features.counted, features.drift_windows, features.alerts TO mojomesh_service",
)
