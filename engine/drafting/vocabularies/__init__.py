"""Drafts of a smaller model that speaks other tokens: the same text, spelled twice."""
