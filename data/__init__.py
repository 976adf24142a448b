"""The data: tokenizers, token files and the order in which samples are read."""
