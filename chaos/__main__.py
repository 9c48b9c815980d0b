"""`python -m chaos`: run the harness, print its table, and fail when a zero is none."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from chaos.run import Run, as_json, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of each run")
    parser.add_argument("--clients", type=int, default=20, help="clients that submit them")
    parser.add_argument("--kill-seconds", type=float, default=60.0, help="how long processes are killed")
    parser.add_argument("--seed", type=int, action="append", help="a seed; again for another run")
    parser.add_argument("--runs", type=int, default=3, help="runs with seeds of their own, where no --seed is given")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--logs", type=Path, help="keep ledger and logs under this directory")
    parser.add_argument("--verbose", action="store_true", help="tell of every kill")
    options = parser.parse_args()
    seeds = options.seed or [random.randrange(1_000_000) for _ in range(options.runs)]
    reports = []
    for seed in seeds:
        print(f"seed {seed}: {options.jobs} jobs, killing for {options.kill_seconds:g} s", flush=True)
        run = Run(
            seed,
            options.jobs,
            options.clients,
            options.kill_seconds,
            verbose=options.verbose,
            logs=options.logs,
        )
        reports.append(run())
        print(table(reports[-1:]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(as_json(reports), indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(table(reports) + "\n")
    if len(reports) > 1:
        print(table(reports))
    failed = [report.seed for report in reports if not report.passed]
    if failed:
        print(f"FAILED: seeds {failed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
