"""Folders of weights, in the ecosystem's format."""
