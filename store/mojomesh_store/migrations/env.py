"""Runs the feature store's revisions; called by Alembic."""

from mojomesh_chassis.database import run_migrations

run_migrations("store")
