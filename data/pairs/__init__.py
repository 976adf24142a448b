"""Sentence pairs: from parallel tables to the batches of translation."""
