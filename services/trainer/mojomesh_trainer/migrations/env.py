"""Alembic's entry: the tables of schema `trainer`."""

from mojomesh_chassis.database import run_migrations

run_migrations("trainer")
