"""SGLang's storage backend: name `kvstrata.connectors.sglang.storage` as `module_path`.

Only `storage` and `engine` need SGLang; the rest knows keys, pages and sessions.
"""
