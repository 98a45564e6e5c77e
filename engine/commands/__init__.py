"""One module per verb of the command line; `run(arguments)` returns the exit status. See `mam2.engine.cli`."""
