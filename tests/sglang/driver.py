"""Runs one SGLang engine and answers orders, one JSON line each.

A process of its own: when its scheduler fails, SGLang kills the whole process tree that it is in,
and its engine can be started only from a main module.

    python driver.py ORDERS_FD ANSWERS_FD SERVER_ARGUMENTS_JSON
"""

from __future__ import annotations

import asyncio
import json
import os
import sys


def main() -> None:
    """Start the engine, say so, and serve until the orders end."""
    import sglang
    from sglang.srt.managers.io_struct import GenerateReqInput

    orders, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")

    def say(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    engine = sglang.Engine(**json.loads(sys.argv[3]))
    say("started")
    for line in orders:
        order = json.loads(line)
        if order["do"] == "ask":
            given = GenerateReqInput(stream=False, **order["given"])
            output = engine.loop.run_until_complete(_only(engine, given))
            meta = output["meta_info"]
            say(
                {
                    "tokens": output["output_ids"],
                    "cached": meta["cached_tokens"],
                    "details": meta.get("cached_tokens_details") or {},
                }
            )
        elif order["do"] == "ask_at_once":
            every = [GenerateReqInput(stream=True, **given) for given in order["given"]]
            say(engine.loop.run_until_complete(_at_once(engine, every, order["abort_s"])))
        elif order["do"] == "forget":
            say(engine.flush_cache().success)
        elif order["do"] == "update":
            say(engine.update_weights_from_disk(order["model"])[0])
        else:  # attach, detach, clear: as SGLang's HTTP server does it
            manager = engine.tokenizer_manager
            work = getattr(manager, f"{order['do']}_hicache_storage")(**order.get("given", {}))
            done = engine.loop.run_until_complete(work)
            say([done.success, getattr(done, "message", "")])
    engine.shutdown()


async def _only(engine, given):
    # To its end: until then a request holds the lock that an update of weights waits for.
    (answer,) = [each async for each in engine.tokenizer_manager.generate_request(given, None)]
    return answer


async def _at_once(engine, every, abort_s):
    """Answer all together; return the tokens of each, and how it ended."""
    manager = engine.tokenizer_manager

    async def one(number, given):
        said, end = [], None
        after_s = abort_s.get(str(number))
        if after_s:
            asyncio.get_running_loop().call_later(after_s, manager.abort_request, given.rid)
        async for each in manager.generate_request(given, None):
            said, end = each["output_ids"] or said, each["meta_info"]["finish_reason"]
            if after_s == 0 and said:
                manager.abort_request(given.rid)
        return said, (end or {}).get("type")

    return await asyncio.gather(*(one(number, given) for number, given in enumerate(every)))


if __name__ == "__main__":
    main()
