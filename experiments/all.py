"""All experiments, one after another: repeats everything that the project publishes.

Says first how long it will take. What is finished is not done again, so the run may be
stopped and resumed at any time; delete a file of the runs to have it made anew. The
image experiments (``experiments.vision``) need downloads and are not among them.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import evidence, harness
from experiments.harness import command_line, files
from experiments.harness.progress import duration


class Run(NamedTuple):
    """One experiment.

    Attributes:
      writes: name of the results file.
      seconds: how long it takes on two quiet cores.
      module: in this package; by default that of the file.
      arguments: of its command line.
    """

    writes: str
    seconds: float
    module: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the module."""
        return self.module or self.writes


# In an order in which what reads the results of another comes after it.
ALONG = ("--along", "--rho", "0.05,0.1,0.15,0.2,0.25,0.3,0.4")
WIDER = (
    *("--width", "64", "--lengths", "600,2000", "--seeds", "4"),
    *("--methods", "adamw,nadamw,momentum_sam"),
)
LONGER = ("--gradients", "5000", "--methods", "adamw,momentum_sam,nadamw")
LONGEST = ("--gradients", "10000", "--methods", "adamw,momentum_sam")
RUNS = (
    Run("label_noise", 100),
    Run("evidence", 6000),
    Run("radius_digits-75", 100, "radius"),
    Run("radius_along_digits-75", 100, "radius", ALONG),
    Run("best_radius", 110),
    Run("radius_warmup", 90),
    Run("lagged_feeding", 110),
    Run("sign", 330),
    Run("flatness", 240),
    Run("bouncing", 5),
    Run("domain_generalization", 300),
    Run("batch_size_0", 300, "batch_size"),
    Run("batch_size_50", 300, "batch_size", ("--noise", "50")),
    Run("char_lm", 300),
    Run("char_lm_width_64", 300, "char_lm", WIDER),
    Run("quantization", 400),
    Run("quantization_5000", 200, "quantization", LONGER),
    Run("quantization_10000", 330, "quantization", LONGEST),
    Run("forgetting", 150),
)


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing."""
    parser = command_line.experiment_parser("all", __doc__)
    parser.add_argument(
        "--list", action="store_true", help="say what is finished, and do nothing"
    )
    options = command_line.parse(parser, arguments)
    shared = ["--runs", str(options.runs.parent if options.smoke else options.runs)]
    shared += ["--smoke"] if options.smoke else []
    shared += ["--publish", str(options.publish)] if options.publish else []
    missing = [run for run in RUNS if options.smoke or not is_finished(options, run)]
    left = {run: seconds_left(run, shared) for run in missing}
    print(
        f"{len(RUNS) - len(missing)} of {len(RUNS)} experiments are finished"
        + ("." if options.smoke else f"; the others take about {said(left.values())}.")
    )
    if options.list:
        for run in RUNS:
            state = said([left[run]]) if run in left else "finished"
            print(f"  {run.writes:<22} {state}")
        return 0
    done = 0
    harness.rows.use_all_cores(options.runs / "compiled")
    try:
        with harness.progress.over("all", sum(left.values())) as progress:
            for run in missing:
                with harness.progress.part_of(progress, left[run]):
                    main_of(run)([*shared, *run.arguments])
                done += 1
    finally:
        if done < len(missing):
            print(
                f"{len(RUNS) - len(missing) + done} of {len(RUNS)} experiments are "
                "finished; the same command goes on from here."
            )
    return 0


def main_of(run: Run) -> Callable[[list[str]], int]:
    """The experiment's own ``main``."""
    return importlib.import_module(f"experiments.{run.name}").main


def is_finished(options: Any, run: Run) -> bool:
    """Whether its results are there."""
    found = files.read_json(options.runs / f"{run.writes}.json")
    return found is not None and found["finished"]


def seconds_left(run: Run, shared: list[str]) -> float:
    """How long an experiment will take; of the evidence, what is missing of it."""
    if run.name == "evidence":
        return evidence.seconds_left(evidence.parsed(shared))
    return run.seconds


def said(seconds: Any) -> str:
    """How long."""
    return f"{duration(sum(seconds))} on two quiet cores"


if __name__ == "__main__":
    command_line.run(main)
