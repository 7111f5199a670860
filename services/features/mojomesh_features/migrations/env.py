"""Alembic's entry: the tables of schema `features`."""

from mojomesh_chassis.database import run_migrations

run_migrations("features")
