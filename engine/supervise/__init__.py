"""Runs that restart after a crash, on the hosts that are left."""
