"""Whether what vLLM hands to its tier belongs to the weights that the model has now.

vLLM tells a tier nothing of new weights, and computes, copies and hands on in different steps.

    fresh --(first look: whatever is seen)--> known --(a look sees others)--> changed --+
      ^                                                                                  |
      +----------------------(a reset that left nothing of before)----------------------+

While changed nothing moves: vLLM's own blocks are of the old weights too. A look before each
step that finds blocks keeps those of old weights from the new ones; a look between the step that
computes a block and the job that stores it keeps blocks of new weights from the old ones' names.
Owner: the thread of vLLM's scheduler, which in this process is the one that changes the weights.
"""

from __future__ import annotations

import logging

from kvstrata.connectors.vllm.weights import WeightsEye

__all__ = ["WeightsGuard"]

log = logging.getLogger("kvstrata.vllm")


class WeightsGuard:
    """Looks at most twice a step: for what it finds, and for what it stores."""

    def __init__(self, eye: WeightsEye) -> None:
        """Remember what is seen now: vLLM has no block yet."""
        self._eye = eye
        self._known = eye.look()
        self._fresh = False
        self._looked_to_find = self._looked_to_store = False
        self.changed = False

    def may_find(self) -> bool:
        """Return whether blocks may be looked for in the step that is being scheduled."""
        if not self._looked_to_find:
            self._looked_to_find = True
            self.look()
        return not self.changed

    def may_store(self) -> bool:
        """Return whether blocks of the steps scheduled so far may be stored under their mark."""
        if not self._looked_to_store:
            self._looked_to_store = True
            self.look()
        return not self.changed

    def scheduled(self) -> None:
        """Take note that a step is about to be computed; to be called at the end of each schedule.

        A first look must not wait until something was computed: the weights may change meanwhile.
        """
        if self._fresh:
            self.look()
        self._looked_to_find = self._looked_to_store = False

    def look(self) -> None:
        """Look now, whatever was seen in this step."""
        found = self._eye.look()
        if self._fresh:
            self._known, self._fresh = found, False
        if found != self._known and not self.changed:
            self.changed = True
            log.warning(
                "the model's weights have changed; kvstrata's tier finds and stores nothing until "
                "reset_prefix_cache(reset_connector=True) finds the engine at rest"
            )

    def reset(self) -> None:
        """Begin anew: vLLM has no block from before, and blocks have other names from now on."""
        self._fresh, self.changed = True, False
        self._looked_to_find = self._looked_to_store = False
