"""Benchmarks of the operators, a training step and the loader: `make gpu` runs all, `make bench` the operators."""
