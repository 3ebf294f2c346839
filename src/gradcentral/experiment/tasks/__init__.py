"""The built-in tasks, one a file, each loaded by its name."""
