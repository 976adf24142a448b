"""The way commands talk to a terminal: options, progress, messages and endings."""
