"""One rank's leases refused, as if its pages had gone between the question and the load.

Another rank has them still, and must compute all the same. No daemon can be made to end in just
that moment of a running engine.
"""

from __future__ import annotations

import itertools
import os


def install():
    """Refuse the leases of rank 1 that the environment lists by number: `3,6,9`."""
    given = os.environ.get("REFUSED_LOADS_OF_RANK_1")
    if not given:
        return
    refused = set(map(int, given.split(",")))
    import torch

    from kvstrata.connectors.sglang.leases import Leases

    take, numbers = Leases.take, itertools.count(1)

    def some(self, request, digests, pages):
        if torch.distributed.get_rank() == 1 and next(numbers) in refused:
            self.drop(request)
            return None
        return take(self, request, digests, pages)

    Leases.take = some
