"""Read the plan: as a value, as a table, as a dict, and in the graph itself."""

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

import fxamp


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    amp = fxamp.convert(model, loss=F.cross_entropy, example_inputs=(x, y), dtype=torch.bfloat16)

    # The plan is a value: one decision a node, each with the casts it asks for.
    print(f"plan for {amp.plan.policy}, mode {amp.plan.mode}\n")
    casts = [
        [decision.name, cast.value, cast.dtype, "parameter" if cast.weight else "activation"]
        for decision in amp.plan
        for cast in decision.casts
    ]
    print(tabulate(casts, ("call", "input", "becomes", "kind")))

    # One decision by the name of its node.
    linear = amp.plan["linear"]
    print(f"\n{linear.name}: {linear.op} in '{linear.module}' has rule {linear.rule} ({linear.reason})\n")

    # The report is the plan as a table, for a terminal or for a page.
    report = amp.report()
    print(report.table(tablefmt="github", columns=("name", "op", "rule", "output", "casts")))

    # Its dict is ready for JSON.
    data = report.to_dict()
    low = [node["name"] for node in data["nodes"] if node["output"] == "bf16"]
    print(f"\n{data['totals']['casts']} casts; in bfloat16: {', '.join(low)}\n")

    # And the result is a torch.fx.GraphModule like any other.
    amp.graph.print_tabular()


if __name__ == "__main__":
    main()
