"""What surrounds work: its process, its ranks, signals, and where measurements go."""
