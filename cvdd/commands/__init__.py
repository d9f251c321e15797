"""What surrounds a command from its beginning to its end."""
