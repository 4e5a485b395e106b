"""Shared machinery of the methods: checks, parameters, streams, attachment, kinds, checkpoints, facts.

Nothing here belongs to one paper. Every module is imported by its own name (``pullback.core.checks``), so
that reading facts or citations never pays for torch.
"""
