"""The backends that carry out a step, and the dispatch that chooses between them."""
