"""The shipped test kit: contract suites for each seam, fakes, and a simulated world."""
