"""What single methods add to the shared stages: one module for each, of pure functions."""
