"""Comparisons of the teacher's parts and its relatives, and of what teaches a student."""
