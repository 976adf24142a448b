"""Looks at every machine of a run before the run starts; see launchers.doctor."""
