"""What prints the figures of README and docs; each file a command of its own."""
