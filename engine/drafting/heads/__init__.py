"""Drafts of layers and heads that read the target's hidden states: EAGLE, multi-token prediction, Medusa."""
