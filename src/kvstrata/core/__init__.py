"""The vocabulary: ids, tiers, errors, configuration. Imports nothing of ours, does no I/O."""
