"""From what was typed to a checked configuration, with errors that say what to type."""
