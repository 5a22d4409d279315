"""The studies: each file a paper, with `study(settings)` that trains, draws and reports."""
