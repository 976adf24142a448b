"""Admin's initialisation: the profile of a model, and the pass that measures it."""
