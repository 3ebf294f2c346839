"""The figures: each function measures what it shows in the runs of a `Study` and returns a `Figure`."""
