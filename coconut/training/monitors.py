"""DeepSpeed's own monitors (TensorBoard, CSV files, Comet), which get every metric once, at its optimizer step.

The engine is not given them: it would add its learning rate at every step, counted in samples.
"""

from __future__ import annotations

from typing import Any

from coconut.config.deepspeed import MONITORS


def open_monitors(ds_config: dict[str, Any], step: int) -> Any:
    """DeepSpeed's `MonitorMaster` for the sections of a DeepSpeed configuration; None where none is enabled.

    Args:
        ds_config: resolved.
        step: that the run goes on after: later events, which it is about to write again, are dropped by TensorBoard.
    """
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    monitor = MonitorMaster(get_monitor_config({name: ds_config.get(name, {}) for name in MONITORS}))
    if monitor.tb_monitor is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # What torch's SummaryWriter does for a `purge_step`, which DeepSpeed does not pass on.
        start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        monitor.tb_monitor.summary_writer.file_writer.add_event(start, step + 1)
    return monitor if monitor.enabled else None
