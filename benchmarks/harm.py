"""Where a delta hurts: which kept questions and neutral texts suffer most, at which strength.

    python benchmarks/harm.py RESULTS.json [RESULTS.json ...] [--worst 4]

Reads what ``cmc-server eval --suite tofu retained`` wrote for one LLM and the seeds of one delta, and averages over the
seeds. Probabilities are those of the right answer; losses of neutral texts are in nats per token. Prints tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = ("retain", "real_authors", "world_facts")


def questions(suites: Sequence[dict[str, Any]], worst: int) -> None:
    """Kept questions: how many right answers are lost, and which fall deepest."""
    texts = suites[0]["questions"]
    print("| set | strength | mean change of P | questions whose P halves | worst |")
    print("|---|---|---|---|---|")
    for name in KEPT:
        found = [
            np.array([one["by_strength"][step]["sets"][name]["items"]["probability"] for one in suites]).mean(0)
            for step in range(len(suites[0]["by_strength"]))
        ]
        for step, probabilities in enumerate(found[1:], start=1):
            change = probabilities - found[0]
            halved = int((probabilities < 0.5 * found[0]).sum())
            lowest = [
                f"{texts[name][index]} ({found[0][index]:.2f} → {probabilities[index]:.2f})"
                for index in np.argsort(change)[:worst]
                if change[index] < -0.01
            ]
            strength = suites[0]["by_strength"][step]["strength"]
            cells = [name.replace("_", " "), f"{strength:g}", f"{change.mean():+.3f}", f"{halved} of {len(change)}"]
            print(f"| {' | '.join([*cells, '<br>'.join(lowest)])} |")


def neutral(suites: Sequence[dict[str, Any]], worst: int) -> None:
    """Neutral texts: the change of the loss, and which texts are hit hardest."""
    print("\n| strength | mean change of the loss | texts that get worse by more than 0.1 | worst |")
    print("|---|---|---|---|")
    base = _losses(suites, 0)
    for step in range(1, len(suites[0]["by_strength"])):
        change = _losses(suites, step) - base
        hit = [
            f"{suites[0]['texts'][index]} (+{change[index]:.2f})"
            for index in np.argsort(-change)[:worst]
            if change[index] > 0.01
        ]
        strength = suites[0]["by_strength"][step]["strength"]
        count = f"{int((change > 0.1).sum())} of {len(change)}"
        print(f"| {strength:g} | {change.mean():+.4f} | {count} | {'<br>'.join(hit)} |")


def _losses(suites: Sequence[dict[str, Any]], step: int) -> NDArray[np.float64]:
    """[texts] nats per token, mean over the seeds."""
    items = [one["by_strength"][step]["items"] for one in suites]
    losses: NDArray[np.float64] = np.array([np.array(one["total"]) / one["num_tokens"] for one in items]).mean(0)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--worst", type=int, default=4)
    options = parser.parse_args()
    suites = [json.loads(path.read_text(encoding="utf-8"))["suites"] for path in options.results]
    questions([one["tofu"] for one in suites], options.worst)
    neutral([one["retained"] for one in suites], options.worst)


if __name__ == "__main__":
    main()
