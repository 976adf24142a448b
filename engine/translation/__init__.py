"""Sentences translated by a trained model."""
