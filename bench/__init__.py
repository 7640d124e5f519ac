"""Each claim about speed is a command here; what they share is in folders."""
