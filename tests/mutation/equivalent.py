"""Mutants that compute the same, each with its reason: (file, old lines, new lines)."""

EQUIVALENT = {}
