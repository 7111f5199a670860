"""Consuming, publishing, database, Redis, telemetry, errors and health, for every service alike."""
