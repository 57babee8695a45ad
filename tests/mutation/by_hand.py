"""Errors that are easy to make and hard to see: (file, old text, new text).

The old text occurs once in the file; where it has moved on, the mutant is reported as
not applicable.
"""

BY_HAND = []
