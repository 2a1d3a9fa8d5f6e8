"""A plan as a table."""

from rich.console import Console
from rich.table import Table

from moe_compile.plan import hardware
from moe_compile.plan.search import Option, Plan

COLUMNS = (
    "ep", "edp", "tp", "dp", "GB", "state", "activations", "step ms", "experts", "exchange", "FSDP", "tp", "end",
    "sent GB", "tokens/s/GPU", "",
)  # fmt: skip


def print_plan(plan: Plan, console: Console, most: int = 12) -> None:
    """The table, what is recommended, and what the numbers rest on."""
    shape, setup, gpu = plan.shape, plan.setup, plan.cluster.gpu
    console.print(
        f"{shape.name}: {shape.parameters / 1e9:.1f} B parameters, {shape.active / 1e9:.1f} B active, {shape.E} "
        f"experts, {shape.K} of them a token, in {shape.moe_layers} of {shape.num_layers} layers",
        highlight=False,
    )
    console.print(
        f"{plan.ranks} x {gpu.name}, {plan.cluster.ranks_a_node} a node; {setup.tokens} tokens a GPU and step, "
        f"sequences of {setup.length}; {'layers' if setup.checkpoint else 'no layer'} checkpointed; "
        f"{setup.kept * 2 + setup.states} bytes of parameter, gradient and optimizer a number",
        highlight=False,
    )
    table = Table(title="predicted, not measured", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for option in plan.options[:most]:
        table.add_row(*row(option, plan), style="bold" if option is plan.best else None if option.fits else "dim")
    console.print(table)
    if (left := len(plan.options) - most) > 0:
        console.print(f"{left} more (ep, tp) are slower, or need more memory", style="dim", highlight=False)
    console.print(*_advice(plan), sep="\n", highlight=False)
    console.print(
        f"Products at {hardware.RATE:.0%} of the data sheet's peak, links at {hardware.LINK:.0%}, memory at "
        f"{hardware.MEMORY:.0%}; balanced routing; launches are not counted. How far such predictions are from "
        "published measurements: docs/planning.md",
        style="dim", highlight=False,
    )  # fmt: skip


def row(option: Option, plan: Plan) -> tuple[str, ...]:
    """One line of the table: sizes in 10^9 bytes, times in milliseconds."""
    layout, memory, step = option.layout, option.memory, option.step
    dp = f"{layout.dp_replicate} x {layout.dp_shard}" if layout.dp_replicate > 1 else str(layout.dp_shard)
    state = memory.parameters + memory.gradients + memory.states
    usable = hardware.USABLE * plan.cluster.gpu.memory_gb * 1e9
    mark = "recommended" if option is plan.best else ""
    if not option.fits:
        mark = f"does not fit in {usable / 1e9:.0f}"
    times = (step.total_us, step.experts_us, step.exchange_us, step.fsdp_us, step.tp_us, step.end_us)
    return (
        str(layout.ep), str(layout.edp), str(layout.tp), dp, f"{memory.total / 1e9:.1f}", f"{state / 1e9:.1f}",
        f"{memory.activations / 1e9:.1f}", *(f"{us / 1e3:.0f}" for us in times), f"{step.sent / 1e9:.1f}",
        f"{option.tokens_s:.0f}", mark,
    )  # fmt: skip


def _advice(plan: Plan) -> list[str]:
    if (best := plan.best) is None:
        return ["Nothing fits: more GPUs, fewer tokens a GPU (--batch), or fewer bytes a number (--state-bytes)."]
    layout = best.layout
    arguments = [f"ep={layout.ep}", f"dp_shard={layout.dp_shard}"]
    arguments += [f"dp_replicate={layout.dp_replicate}"] if layout.dp_replicate > 1 else []
    arguments += [f"tp={layout.tp}"] if layout.tp > 1 else []
    split = ', experts="sharded"' if layout.splits_experts else ""
    return [
        f"mesh = moe_compile.build_mesh({', '.join(arguments)})",
        f"model = moe_compile.parallelize(model, mesh{split})",
    ]
