"""Is every multiply-accumulate of an ensemble as cheap as in its base model? Inference.

`python benchmarks/inference.py` measures, in one process and in turns: the base model, the ensemble
with all levels packed, all looped and as tuned, 16 independent networks in a loop, and
`torch.func.vmap` over their stacked weights. E is (T_base * MACs_hne / MACs_base) / T_auto; 1 means
that every multiply-accumulate costs what it costs in the base model.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Any

import common
import psutil
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from treeify.engine import timing
from treeify.parity.sweep import is_out_of_memory

BATCHES = (1, 8, 32, 128)
# Bytes that the process may take when `vmap` runs in it.
MEMORY = 16 * 10**9
# Seconds after which a comparison is not repeated.
LONG = 5.0


def independent(networks: list[nn.Module], x: Tensor) -> Tensor:
    """Every network's logits, one after the other."""
    return torch.stack([network(x) for network in networks], dim=1)


def stacked(networks: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The same by `vmap` over the networks' stacked weights."""
    parameters, buffers = stack_module_state(networks)
    skeleton = networks[0]

    def run(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        logits: Tensor = functional_call(skeleton, (parameters, buffers), (x,))
        return logits

    mapped = vmap(run, in_dims=(0, 0, None), out_dims=1)
    return lambda x: mapped(parameters, buffers, x)


def timed_vmap(networks: list[nn.Module], x: Tensor) -> list[float] | None:
    """Seconds of some rounds, or of one where it takes long; None if memory does not suffice."""
    process = psutil.Process().memory_info()
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = process.vms + max(0, MEMORY - process.rss)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        mapped = stacked(networks)
        first = timing.timed(lambda: mapped(x), x.device)
        if first > LONG:
            return [first]
        return timing.alternate({"vmap": lambda: mapped(x)}, x.device, repeats=5)["vmap"]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def measure(
    report: common.Report, case: common.Case, batches: Sequence[int], budget: float
) -> None:
    """One row per batch size."""
    rows = {count: f"{case.name}, batch {count}" for count in batches}
    if not any(report.wanted(row) for row in rows.values()):
        return
    base = case.base()
    hne = case.ensemble(base)
    networks = [hne.leaf(leaf).to(memory_format=torch.channels_last) for leaf in range(hne.leaves)]
    ratio = hne.count_macs() / hne.count_macs(1)
    for count, row in rows.items():
        if not report.wanted(row):
            continue
        x = case.images(count)
        hne.tune(x)

        def way(setting: str, x: Tensor = x) -> Callable[[], Any]:
            def run() -> None:
                hne.execution = setting
                hne(x)

            return run

        actions: dict[str, Callable[[], Any]] = {
            "base": lambda x=x: base(x),  # type: ignore[misc]
            **{name: way(name) for name in ("packed", "looped", "auto")},
            "product": common.product(),
        }
        with torch.inference_mode():
            times = timing.alternate(actions, x.device, repeats=21, budget=budget)
            others: dict[str, Callable[[], Any]] = {
                "base again": actions["base"],
                "independent": lambda x=x: independent(networks, x),  # type: ignore[misc]
            }
            least = 2 if count > 8 else 3
            times |= timing.alternate(
                others, x.device, repeats=7, budget=budget / 2, at_least=least
            )
            if (mapped := timed_vmap(networks, x)) is not None:
                times["vmap"] = mapped
        typical = timing.medians(times)
        hne.execution = "auto"
        report.add(
            row,
            **common.columns(times, ratio, count * hne.count_macs()),
            independent_vs_auto=typical["independent"] / (hne.leaves / ratio) / typical["auto"],
            vmap_vs_auto=typical["vmap"] / typical["auto"] if "vmap" in typical else "over 16 GB",
            plan=str(hne.plan(x)),
        )


COLUMNS = (
    *("macs_ratio", "base", "packed", "looped", "auto", "independent", "vmap", "E"),
    *("auto_vs_best", "independent_vs_auto", "vmap_vs_auto", "share_of_product", "plan"),
)


def main() -> None:
    """Measure what is asked for and print the table."""
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    options = parser.parse_args()
    common.prepare()
    report = common.Report("inference", COLUMNS, options)
    for case in (*common.CIFAR, common.CIFAR_VIT, *common.IMAGENET):
        measure(report, case, options.batches, options.budget)
    report.show()


if __name__ == "__main__":
    main()
