"""Movers of bytes behind `TransferBackend`: memcpy, posix, and the seal of blocks in memory."""
