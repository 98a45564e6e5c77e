"""Timings of the operators, a training step and the loader: `make gpu` for all, `make bench` for the operators."""
