"""Numbers that stand for a width: which they are, and their new values."""
