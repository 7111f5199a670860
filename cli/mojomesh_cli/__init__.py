"""The `mojomesh` command."""
