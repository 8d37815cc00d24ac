"""Request traces: one loader a format, each line checked, read as a stream."""

from kvstrata.sim.traces.model import TraceError, TraceInfo, TraceRequest
from kvstrata.sim.traces.trace import FORMATS, Trace, open_trace

__all__ = ["FORMATS", "Trace", "TraceError", "TraceInfo", "TraceRequest", "open_trace"]
