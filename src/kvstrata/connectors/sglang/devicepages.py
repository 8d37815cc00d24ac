"""SGLang's device pool as pages of bytes; a page of it is the same block as the host pool's.

The pool has one buffer for the keys and one for the values of each layer. A block is a page of all
of them, keys first: the bytes that a host pool in `layer_first` or `page_first_direct` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.connectors.sglang.hostpages import Bytes
from kvstrata.core.errors import LayoutError

__all__ = ["DevicePages"]


class DevicePages:
    """The buffers of a pool, cut into pages; shares their memory."""

    def __init__(self, keys: Sequence[Bytes], values: Sequence[Bytes]) -> None:
        """Take one array of keys and one of values for each layer, `(pages, bytes of a page)`.

        Raises LayoutError unless all have the same shape.
        """
        self._parts = [*keys, *values]  # in the order of a block
        shapes = {part.shape for part in self._parts}
        if len(shapes) != 1 or len(keys) != len(values):
            raise LayoutError(
                f"the device pool's layers have {len(shapes)} shapes, where kvstrata knows one",
                hint="run this model without the linker",
            )
        self.layers = len(keys)
        self.count = int(self._parts[0].shape[0])

    def read(self, page: int, block: Bytes) -> None:
        """Copy a page into a block."""
        pieces = block.reshape(len(self._parts), -1)
        for place, part in enumerate(self._parts):
            pieces[place] = part[page]

    def write(self, page: int, block: Bytes) -> None:
        """Copy a block into a page."""
        for layer in range(self.layers):
            self.write_layer(layer, page, block)

    def write_layer(self, layer: int, page: int, block: Bytes) -> None:
        """Copy one layer of a block, its keys and its values, into a page."""
        pieces = block.reshape(len(self._parts), -1)
        for place in (layer, self.layers + layer):
            self._parts[place][page] = pieces[place]
