"""What a GPU says of the Triton kernels: right first, then how fast; one command, and no install.

Stage by stage, each into the JSON file as it ends: the machine and its copy rate, compiling (in
parallel processes, into Triton's cache), the suite's tests of the kernels, speed beside torch's and
the copy's, the host's part on small inputs, layers compiled by torch, and other tiles. Stops where
results are wrong, and ends by itself after --seconds with what it has.

    PYTHONPATH=src TRUENORM_CUDA=triton python tools/gpu_check.py --seconds 540 --json check.json

Exit status: 0 all done, 1 something is wrong, 3 out of time. --interpret runs all of it in Triton's
interpreter on tiny sizes, where no figure means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Report:
    """What is known so far, and the file that holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, Any] = {}
        self.ended = "not yet"
        self._writing = threading.Lock()

    def write(self) -> None:
        with self._writing:
            text = json.dumps({"ended": self.ended, **self.stages}, indent=1, default=str)
            whole = self.path.with_suffix(".part")
            whole.write_text(text + "\n", encoding="utf-8")
            whole.replace(self.path)

    def table(self) -> str:
        """A line for each stage, and one for each case that was timed."""
        lines = [f"{name:<12}{found['seconds']:>7.1f} s  {found.get('said', '')}"
                 for name, found in self.stages.items()]  # fmt: skip
        timed = self.stages.get("speed", {}).get("cases", [])
        if timed:
            head = ("forward", "of floor", "backward", "of floor", "both", "torch/ours")
            lines.append(f"\n{'':<58}" + "".join(f"{h:>11}" for h in head))
        for case in timed:
            if case["wrong"]:
                lines.append(f"{case['name']:<58}  WRONG: {case['wrong']}")
                continue
            cells = [f"{case[f'{d} us']:.1f} us" if at == 0 else f"{case[f'{d} of floor']:.2f}"
                     for d in ("forward", "backward") for at in (0, 1)]  # fmt: skip
            cells += [f"{case['both us']:.1f} us", f"{case['torch over ours']:.2f}"]
            lines.append(f"{case['name']:<58}" + "".join(f"{c:>11}" for c in cells))
        return "\n".join([*lines, f"\n{self.ended}: {self.path}"])


def run(args: argparse.Namespace, report: Report) -> int:
    import gpu_stages

    setup = gpu_stages.Setup(args.interpret, args.device, time.monotonic() + args.seconds)
    for stage, here in gpu_stages.STAGES:
        name = stage.__name__
        found: dict[str, Any] = {"seconds": 0.0}
        report.stages[name] = found
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            with gpu_stages.kernels(args.interpret) if here else nullcontext():
                stage(setup, found)
        except gpu_stages.WrongError as error:
            found["wrong"] = str(error)
            report.ended = f"wrong in {name}: {error}"
        except Exception as error:  # a stage that fails leaves the others to run
            found["failed"] = traceback.format_exc()
            print(found["failed"], file=sys.stderr)
            found["said"] = f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
        found["seconds"] = time.perf_counter() - start
        print(f"  {found['seconds']:.1f} s  {found.get('said', '')}", flush=True)
        report.write()
        if "wrong" in found:
            return 1
    failed = [name for name, found in report.stages.items() if "failed" in found]
    report.ended = f"failed in {', '.join(failed)}" if failed else "done"
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="it ends by then")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--interpret", action="store_true", help="tiny, without a GPU")
    parser.add_argument("--warm", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tools")]
    args.device = "cpu" if args.interpret else "cuda"
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.interpret and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: run it where there is one, or --interpret")
    import gpu_stages

    if args.warm is not None:
        with gpu_stages.kernels(args.interpret):
            return gpu_stages.warm(args.device, args.interpret, *args.warm)
    report = Report(args.json)

    def out_of_time() -> None:
        report.ended = "out of time in " + ([*report.stages] or ["the start"])[-1]
        gpu_stages.end_children()
        report.write()
        print(f"\n{report.table()}", flush=True)
        os._exit(3)

    # a call that hangs in a driver is ended too
    watch = threading.Timer(args.seconds, out_of_time)
    watch.daemon = True
    watch.start()
    status = run(args, report)
    watch.cancel()
    report.write()
    print(f"\n{report.table()}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
