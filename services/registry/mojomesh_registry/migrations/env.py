"""Alembic's entry: the tables of schema `registry`."""

from mojomesh_chassis.database import run_migrations

run_migrations("registry")
