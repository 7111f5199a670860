"""Feast's point-in-time join of the bench's files, run by Feast's own Python: `feast_join.py FOLDER N FEATURE...`; prints JSON."""

import json
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64, String

MOST_MEMORY = 18 * 10**9


def main(folder: Path, n: int, features: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            provider="local",
            registry=str(folder / f"feast-{n}.db"),
            online_store=None,
            offline_store={"type": "dask"},
            entity_key_serialization_version=3,
        )
    )
    views: list[FeatureView] = []
    for name, key in (("accounts", "account"), ("places", "place")):
        file = folder / f"feast-{name}-{n}.parquet"
        table = pd.read_parquet(folder / f"{name}-{n}.parquet", columns=["entity_id", "event_time", "created_at", *features])
        table.rename(columns={"entity_id": key}).to_parquet(file)
        del table
        entity = Entity(name=key, join_keys=[key], value_type=ValueType.STRING)
        store.apply(entity)
        views.append(
            FeatureView(
                name=name,
                entities=[entity],
                ttl=timedelta(days=365),
                schema=[Field(name=feature, dtype=String if feature.startswith("c") else Float64) for feature in features],
                source=FileSource(path=str(file), timestamp_field="event_time", created_timestamp_column="created_at"),
            )
        )
    store.apply(views)
    spine = pd.read_parquet(folder / f"trips-{n}.parquet", columns=["entity_id", "event_time", "place", "distance", "hour"])
    spine = spine.rename(columns={"entity_id": "account", "event_time": "event_timestamp"}).drop_duplicates(["account", "event_timestamp"])
    began, before = time.perf_counter(), time.process_time()
    wanted = [f"{view.name}:{feature}" for view in views for feature in features]
    found = store.get_historical_features(entity_df=spine, features=wanted, full_feature_names=True).to_df()
    found.to_parquet(folder / "feast.parquet", compression="zstd")
    spent, cpu = time.perf_counter() - began, time.process_time() - before
    gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"rows": len(found), "s": spent, "cpu_s": cpu, "gb": gb}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
