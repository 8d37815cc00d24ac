"""The name that TensorRT-LLM's `kvbm` preset imports; kvstrata serves it."""
