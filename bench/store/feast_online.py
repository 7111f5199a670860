"""A Feast repository with the bench's rows in its Redis, made by Feast's own Python: `feast_online.py REPOSITORY ROWS.parquet...`.

Each file is a feature view, named like it, by the entity that its first column names.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, String
from pandas.api.types import is_numeric_dtype


def main(repository: Path, files: list[Path]) -> None:
    os.chdir(repository)
    store = FeatureStore(repo_path=str(repository))
    tables = {file.stem: pd.read_parquet(file) for file in files}
    keys = {table.columns[0] for table in tables.values()}
    entities = {key: Entity(name=key, join_keys=[key], value_type=ValueType.STRING) for key in keys}
    views = [
        FeatureView(
            name=file.stem,
            entities=[entities[tables[file.stem].columns[0]]],
            ttl=timedelta(days=30),
            schema=[
                Field(name=name, dtype=Float64 if is_numeric_dtype(column) else String)
                for name, column in tables[file.stem].iloc[:, 1:].items()
                if name != "event_time"
            ],
            source=FileSource(path=str(file), timestamp_field="event_time"),
        )
        for file in files
    ]
    same, joined = (FeatureService(name=name, features=[views[0], views[n]]) for n, name in enumerate(("same", "joined"), 1))
    store.apply([*entities.values(), *views, same, joined])
    for view in views:
        store.write_to_online_store(view.name, tables[view.name])


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
