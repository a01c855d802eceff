"""Drafts of whole blocks by diffusion over the target's hidden states: DFlash, DSpark."""
