"""One module a verb of the command line: `run(arguments)` returns the exit status. See `mam2.engine.cli`."""
