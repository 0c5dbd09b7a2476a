"""Many independent jobs over local processes, or over a Ray cluster; one failure stops none."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from stream3r_core.errors import ConfigError, MissingDependencyError, Stream3rError

Job = Callable[[], Any]  # picklable: a function of a module, or a functools.partial of one


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value, or why it failed."""

    name: str
    value: Any = None
    failure: str = ''


def run_jobs(
    jobs: Mapping[str, Job],
    num_workers: int | None = None,
    ray_address: str = '',
    device: str = 'cpu',
) -> Iterator[Outcome]:
    """Run named jobs and yield each outcome as soon as it is there, in any order.

    ``num_workers`` local processes share the cores (None: one for every two cores; 0: this very
    process, one by one). A ``ray_address`` ('auto', 'host:port', 'ray://host:port') runs the jobs
    there instead, each with a GPU of its own if ``device`` is 'cuda', or 'auto' and the cluster
    has one. A job that raises, or whose process is killed, fails alone.

    Raises:
        ConfigError: No Ray cluster answers, or it has no GPU where one is wanted.
        MissingDependencyError: A Ray address is given without ray.

    """
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f'expected a number of workers >= 0, got {num_workers}')
    if ray_address:
        yield from _on_ray(jobs, ray_address, device)
    elif num_workers == 0:
        yield from (_run(name, job) for name, job in jobs.items())
    elif jobs:
        default = max(1, (os.cpu_count() or 1) // 2)
        yield from _in_processes(jobs, min(num_workers or default, len(jobs)))


def _run(name: str, job: Job) -> Outcome:
    try:
        return Outcome(name, job())
    except Stream3rError as error:
        return Outcome(name, failure=str(error))
    except Exception:  # whatever it is, the other jobs go on; the trace tells the rest
        return Outcome(name, failure=traceback.format_exc())


def _in_processes(jobs: Mapping[str, Job], num_workers: int) -> Iterator[Outcome]:
    """Run all jobs; where a killed process took others down with it, these run again alone."""
    suspects = []
    for name, future in _submitted(jobs, num_workers):
        try:
            yield future.result()
        except BrokenProcessPool:
            suspects.append(name)
    for suspect in suspects:
        ((name, future),) = _submitted({suspect: jobs[suspect]}, 1)
        try:
            yield future.result()
        except BrokenProcessPool:
            yield Outcome(
                name,
                failure='the process was killed; most often memory ran out: use fewer workers',
            )


def _submitted(jobs: Mapping[str, Job], num_workers: int) -> Iterator[tuple[str, Future]]:
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    context = multiprocessing.get_context('spawn')  # a forked CUDA or OpenMP runtime hangs
    with ProcessPoolExecutor(num_workers, context, _set_threads, (threads,)) as pool:
        futures = {pool.submit(_run, name, job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _set_threads(number: int) -> None:
    import torch

    torch.set_num_threads(min(number, torch.get_num_threads()))


def _on_ray(jobs: Mapping[str, Job], address: str, device: str) -> Iterator[Outcome]:
    _check_reachable(address)
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "a Ray address was given, but ray is not installed: pip install 'stream3r_ros[ray]'"
        ) from error
    try:
        ray.init(address=None if address == 'local' else address, ignore_reinit_error=True)
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, error) from error
    num_gpus = gpus_per_job(device, ray.cluster_resources().get('GPU', 0))
    remote = ray.remote(max_retries=0, num_gpus=num_gpus)(_run)
    pending = {remote.remote(name, job): name for name, job in jobs.items()}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        name = pending.pop(done)
        try:
            yield ray.get(done)
        except ray.exceptions.RayError as error:
            yield Outcome(name, failure=f'the Ray worker failed: {error}')


def _check_reachable(address: str) -> None:
    """Raise ConfigError where nobody listens: Ray itself tries for minutes, then exits."""
    host, _, port = address.removeprefix('ray://').rpartition(':')
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f'no Ray cluster answers at {address!r} ({error}): start one (ray start --head) and give '
        "its address, or 'local'; without a Ray address, processes of this machine do the work"
    )


def gpus_per_job(device: str, cluster_gpus: float) -> int:
    """Return the GPUs that Ray is to give each job: it hides the others from it."""
    if device == 'cpu' or (device == 'auto' and not cluster_gpus):
        return 0
    if device not in ('auto', 'cuda') or not cluster_gpus:
        raise ConfigError(
            f'model.device {device!r} on a Ray cluster with {cluster_gpus:g} GPUs: Ray gives each '
            "job its GPU, which is 'cuda' there; without any, use 'cpu'"
        )
    return 1
