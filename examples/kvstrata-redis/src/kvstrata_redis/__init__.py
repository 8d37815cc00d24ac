"""Redis or Valkey as a tier of kvstrata: `store:redis:redis://HOST:6379:64GiB`."""

from kvstrata_redis.store import RedisStore

__all__ = ["RedisStore"]
