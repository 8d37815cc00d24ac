"""What owns bytes: the shared host arena and the slab file. Knows slots, not policies."""
