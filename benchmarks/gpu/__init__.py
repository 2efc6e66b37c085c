"""Everything that a GPU is needed for, in one command: `python -m benchmarks.gpu`."""
