"""What people run: the command line. Wires the rooms together, decides nothing."""
