"""A running ingest, in this process or as a process of its own, and what a client of it can see."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from aiokafka import ConsumerRecord
from sqlalchemy import text
from starlette.types import Receive, Scope, Send

from mojomesh_chassis.database import open_database
from mojomesh_contracts.definitions import parse_definition
from mojomesh_contracts.events import DefinitionApplied, EventReceived, FeatureValue, FeaturesWritten
from mojomesh_ingest.app import build
from mojomesh_ingest.settings import Settings

FLIGHTS = {
    "kind": "FeatureSet",
    "name": "flights",
    "entity": "flight_id",
    "features": {
        "carrier": {"type": "category"},
        "distance": {"type": "number", "unit": "mile", "min": 0, "max": 10_000},
        "late": {"type": "boolean"},
    },
}
GROUP = "ingest.events.received.v1"
RECEIVED = EventReceived.topic.name
