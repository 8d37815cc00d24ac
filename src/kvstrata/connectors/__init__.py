"""Adapters between one engine and us. Siblings never meet; an engine word stays inside its own."""
