"""The whole mesh on one machine: real servers from Python packages."""
