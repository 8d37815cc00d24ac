"""Lets vLLM's own tiered offloading run on the CPU platform, which it refuses: copies are torch's.

Taken out of the tree as `OffloadingConnector` allows (`spec_module_path`); everything but the copy
between the engine's pages and its host region is vLLM's.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class TorchWorker(OffloadingWorker):
    """Copies at once, by torch's indexing; one page is one chunk."""

    def __init__(self, caches: Any, host: list[torch.Tensor]) -> None:
        """Copy between `caches` and `host`, tensors of equal pages."""
        self._caches = caches
        self._host = host
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy pages to the host."""
        return self._copy(job_id, src_spec, dst_spec, load=False)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy pages from the host."""
        return self._copy(job_id, dst_spec, src_spec, load=True)

    def get_finished(self) -> list[TransferResult]:
        """Return what was copied since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: Any) -> None:
        """Return: a copy has ended when it was submitted."""

    def _copy(self, job_id: int, device: Any, host: Any, *, load: bool) -> bool:
        began = time.perf_counter()
        moved = offset = 0
        for group, size in enumerate(device.group_sizes):
            part = slice(offset, offset + size)
            pages = torch.from_numpy(device.block_ids[part].astype(np.int64))
            chunks = torch.from_numpy(host.block_ids[part].astype(np.int64))
            offset += size
            for reference in self._caches.group_data_refs[group]:
                engine = self._caches.tensors[reference.tensor_idx].tensor
                kept = self._host[reference.tensor_idx]
                if load:
                    engine[pages] = kept[chunks]
                else:
                    kept[chunks] = engine[pages]
                moved += reference.page_size_bytes * size
        self._done.append(
            TransferResult(
                job_id, success=True, transfer_size=moved, transfer_time=time.perf_counter() - began
            )
        )
        return True


class CpuTieringSpec(TieringOffloadingSpec):
    """vLLM's tiers on the CPU platform."""

    def get_manager(self) -> Any:
        """Return the scheduler's half, which is made last.

        Then the host region needs no name any more, and no end of the process leaves it behind.
        """
        try:
            return super().get_manager()
        finally:
            name = f"/dev/shm/vllm_offload_{self.config.engine_id}.mmap"  # noqa: S108  # vLLM's
            Path(name).unlink(missing_ok=True)

    def get_worker(self, kv_caches: Any) -> TorchWorker:
        """Return the one worker."""
        if not self._worker:
            self._region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
                barrier=None,
            )
            host = [
                self._region.create_next_worker_view(each.page_size_bytes * self.blocks_per_chunk)
                for each in kv_caches.tensors
            ]
            self._worker = TorchWorker(kv_caches, host)
        return self._worker

    def _uses_shared_region(self) -> bool:
        return True
