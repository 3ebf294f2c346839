"""One module per figure, each with a function ``…_figure(study)`` that measures and returns a `Figure`."""
