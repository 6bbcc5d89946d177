"""Coverage-guided fuzzing of every parser of external input. `make fuzz` runs it."""
