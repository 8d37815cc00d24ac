"""What this machine's tiers do beside the best that other tools get out of it."""
