"""Alembic's entry: the tables of schema `ingest`."""

from mojomesh_chassis.database import run_migrations

run_migrations("ingest")
