"""Definitions, model versions, promotion and lineage."""
