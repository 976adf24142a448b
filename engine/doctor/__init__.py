"""The examination of every machine before a run starts; see launchers.doctor."""
