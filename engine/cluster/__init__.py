"""Ranks and hosts: how they meet, are watched and are told to stop."""
