"""Read the plan: as a value, as a table, as a dict, and in the graph itself."""

import torch
from tabulate import tabulate
from torch import nn

import fxamp


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    amp = fxamp.convert(model, example_inputs=(torch.randn(4, 16),), dtype=torch.bfloat16)

    # The plan is a value: one decision a node, each with the casts it asks for.
    print(f"plan for {amp.plan.policy}, mode {amp.plan.mode}\n")
    casts = [
        [decision.name, cast.value, cast.dtype, "parameter" if cast.weight else "activation"]
        for decision in amp.plan
        for cast in decision.casts
    ]
    print(tabulate(casts, ("call", "input", "becomes", "kind")))

    # One decision, by the name of its node.
    linear = amp.plan["linear"]
    print(f"\n{linear.op} in module '{linear.module}' has the rule {linear.rule}: {linear.reason}\n")

    # The report is the plan as a table, in any format of the tabulate package.
    report = amp.report()
    print(report.table(tablefmt="github", columns=("name", "op", "rule", "output", "casts")))

    # Its dict is ready for JSON.
    data = report.to_dict()
    low = [node["name"] for node in data["nodes"] if node["output"] == "bf16"]
    print(f"\n{data['totals']['casts']} casts; in bfloat16: {', '.join(low)}\n")

    # The casts themselves are nodes of a torch.fx graph like any other.
    amp.graph.print_tabular()


if __name__ == "__main__":
    main()
