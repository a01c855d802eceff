"""Drafts of a smaller model that speaks the same tokens."""
