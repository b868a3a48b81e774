"""Random calls of the ops: `python -m fuzz` in tests/, or `make fuzz`."""
