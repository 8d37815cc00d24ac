"""Processes: the node daemon, its messages, and the clients that talk to it."""
