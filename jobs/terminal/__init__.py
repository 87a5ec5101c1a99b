"""How things are shown on a terminal or in a log."""
