"""Training networks: committee members, students, and those of the matching methods."""
