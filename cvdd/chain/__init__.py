"""The chain of artefacts; each stage first makes the parents that it misses."""
