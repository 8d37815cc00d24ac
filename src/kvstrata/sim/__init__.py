"""Traces through the real manager in virtual time: what-if answers and capacity plans."""
