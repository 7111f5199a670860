"""The feature store beside other ways to do the same: `make bench-store`."""
