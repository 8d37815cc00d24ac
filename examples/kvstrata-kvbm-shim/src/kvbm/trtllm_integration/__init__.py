"""Where the preset looks for its connector."""
