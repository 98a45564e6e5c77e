"""Helpers that tests of several folders import: paths, commands, small models, small loaders."""
