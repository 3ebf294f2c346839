"""The figures: each function takes measurements in the runs of a `Study` and returns a `Figure`."""
