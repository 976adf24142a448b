"""The JSON of a run: its keys, rules, messages and documentation."""
