"""Token ids to block identity: full blocks, lineage digests, keyed sequence hashes (ADR 0001)."""

from kvstrata.tokens.lineage import TOKEN_ID_MAX, PromptLineage, lineage_digests
from kvstrata.tokens.namespace import Namespace, NamespaceKey, sequence_hashes

__all__ = [
    "TOKEN_ID_MAX",
    "Namespace",
    "NamespaceKey",
    "PromptLineage",
    "lineage_digests",
    "sequence_hashes",
]
