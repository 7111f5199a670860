"""The feature store's tables, migrations, shard routing and Redis layout."""
