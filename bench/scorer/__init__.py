"""How fast the scorer serves, beside other servers of the same model: `make bench-scorer`, or `python -m bench.scorer --quick`."""
