"""SGLang's storage backend: name `kvstrata.connectors.sglang.storage` as `module_path`.

Or its linker, device to tiers: name `kvstrata.connectors.sglang.linker` as `linker_module_path`.

Only `storage`, `linker`, `engine` and `device` need SGLang or torch; the rest knows keys, pages and
sessions.
"""
