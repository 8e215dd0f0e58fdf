"""aura: Spanish text -> a language model from scratch."""
