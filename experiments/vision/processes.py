"""One process, several of this machine, or those of a pod: options and a launcher."""

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Collection

import jax

from experiments.harness import command_line


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options by which the processes of one job find each other."""
    whole = command_line.positive_integer
    group = parser.add_argument_group("processes")
    group.add_argument("--pod", action="store_true", help="find the other hosts")
    group.add_argument("--coordinator", help="host:port of process 0")
    group.add_argument("--process-count", type=whole, help="with --coordinator")
    group.add_argument("--process-id", type=int, help="with --coordinator")
    group.add_argument("--local-processes", type=whole, help="start so many here")
    group.add_argument(
        "--restarts", type=int, default=0, help="of local processes, after one died"
    )


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    alone = [arguments.coordinator, arguments.process_count, arguments.process_id]
    if any(a is None for a in alone) and any(a is not None for a in alone):
        parser.error(
            "--coordinator, --process-count and --process-id go together: pass all"
        )


def starts_others(arguments: argparse.Namespace) -> bool:
    """Whether this process is only to start the others."""
    return bool(arguments.local_processes and not arguments.coordinator)


def launch(
    module: str,
    given: list[str],
    arguments: argparse.Namespace,
) -> int:
    """Start a module once for each process; start all again if one dies.

    Args:
      module: what ``python -m`` runs.
      given: the command line, without the name of the program.
      arguments: the same, parsed.

    Returns:
      0; 2 if the command line or the data was refused; 1 if a process died.
    """
    for _ in range(arguments.restarts + 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        removed = ("--local-processes", "--restarts")
        common = [*_without(given, removed), "--coordinator", f"127.0.0.1:{port}"]
        common += ["--process-count", str(arguments.local_processes)]
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", module, *common, "--process-id", str(i)]
            )
            for i in range(arguments.local_processes)
        ]
        try:
            while any(w.poll() is None for w in workers) and not any(
                w.poll() for w in workers
            ):
                time.sleep(0.1)
            died = [w.poll() for w in workers if w.poll()]
        except KeyboardInterrupt:
            for worker in workers:  # each saves, as after a signal of its own
                worker.terminate()
            for worker in workers:
                worker.wait()
            raise
        finally:
            for worker in workers:
                # The others would wait for the one that died.
                if worker.poll() is None:
                    worker.kill()
            codes = [worker.wait() for worker in workers]
        if not any(codes):
            return 0
        if 2 in died:
            # The command line or the data is wrong, and the process has said so.
            return 2
        print(f"A process died (exit codes {codes}).", file=sys.stderr)
    return 1


def join(arguments: argparse.Namespace) -> None:
    """Be one of the processes of the job, before the first use of a device."""
    if arguments.coordinator:
        if jax.config.jax_platforms in (None, "", "cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            arguments.coordinator, arguments.process_count, arguments.process_id
        )
    elif arguments.pod:
        jax.distributed.initialize()


def _without(arguments: list[str], removed: Collection[str]) -> list[str]:
    """A command line without some options and their values."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.split("=")[0] not in removed:
            kept.append(argument)
        skip = argument in removed
    return kept
