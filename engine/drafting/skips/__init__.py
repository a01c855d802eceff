"""Drafts of the target itself with some of its layers skipped."""
