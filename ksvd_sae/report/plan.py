"""A plan as a table on the terminal."""

from rich.table import Table

from ksvd_sae.run.plan import Plan


def plan_table(plan: Plan) -> Table:
    """Stages with time, memory and disk; below them the whole run beside what is free."""
    on = f"{plan.device}, {plan.threads} threads" if plan.device == "cpu" else plan.device
    table = Table(title=f"{plan.config} on {on}", caption=_caption(plan), caption_justify="left")
    table.add_column("stage")
    for column in ("time", "memory", *(["GPU"] if plan.device != "cpu" else []), "disk"):
        table.add_column(column, justify="right")
    table.add_column("how known")
    table.add_column("what")
    for stage in plan.stages:
        done = stage.how == "done"
        gpu = [] if plan.device == "cpu" else [_size(stage.device_bytes)]
        sizes = [_time(stage.seconds), _size(stage.host_bytes), *gpu, _size(stage.disk_bytes)]
        cells = ["" for _ in sizes] if done else sizes
        what = stage.amount if stage.note is None else f"{stage.amount} ({stage.note})"
        table.add_row(stage.name, *cells, stage.how, what, style="dim" if done else None)
    device = max((stage.device_bytes or 0 for stage in plan.stages), default=0)
    gpu = [] if plan.device == "cpu" else [_size(device)]
    table.add_section()
    table.add_row("all", _time(plan.seconds), _size(plan.host_bytes), *gpu, _size(plan.disk_bytes))
    free = [] if plan.device == "cpu" else [_size(plan.device_free_bytes)]
    table.add_row("free", "", _size(plan.host_free_bytes), *free, _size(plan.disk_free_bytes))
    return table


def _caption(plan: Plan) -> str:
    side = f"; {plan.processes} evals at a time" if plan.processes > 1 else ""
    return f"Measured in {plan.probe_s:.0f} s. Memory: most at a time. Disk of all: at its fullest{side}."


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "?"
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.0f} MiB"
