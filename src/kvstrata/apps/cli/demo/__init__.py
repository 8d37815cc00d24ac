"""`kvstrata demo`: one conversation, played cold, warm and after a kill, on a CPU and offline.

* `play` is the walk: `run_demo` runs the phases in order and returns the exit code.
* `model` makes the model, `conversation` the prompts, `report` the table and the JSON.
* `engine` starts, talks to and ends `engine_child`, the process that holds the engine.
* `engines` lists the engines; `vllm_engine`, `sglang_engine`, `transformers_engine` run one.
"""
