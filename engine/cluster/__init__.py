"""Ranks and hosts: rendezvous, watchdog, signals."""
