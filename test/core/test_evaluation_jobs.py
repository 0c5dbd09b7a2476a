"""Many jobs: one that fails, or dies, stops none."""

import os
import sys

import pytest

from stream3r_core.errors import ConfigError, DataError, MissingDependencyError
from stream3r_core.evaluation.jobs import gpus_per_job, run_jobs


def give(value):
    return value


def refuse():
    raise DataError('the bag is empty; record it anew')


def stumble():
    raise ZeroDivisionError('a bug')


def die():
    os._exit(9)


def outcomes(jobs, **options):
    return {outcome.name: outcome for outcome in run_jobs(jobs, **options)}


def one():
    return give(1)


def two():
    return give(2)


MIXED = {'a': one, 'bad': refuse, 'bug': stumble, 'b': two}


@pytest.mark.parametrize('num_workers', [0, 2])
def test_failures_stay_alone_and_say_why(num_workers):
    done = outcomes(MIXED, num_workers=num_workers)
    assert (done['a'].value, done['b'].value) == (1, 2)
    assert done['bad'].failure == 'the bag is empty; record it anew'
    assert 'ZeroDivisionError: a bug' in done['bug'].failure
    assert set(done) == set(MIXED)


def test_a_process_that_is_killed_takes_no_other_job_with_it():
    done = outcomes({'a': one, 'killed': die, 'b': two}, num_workers=1)
    assert (done['a'].value, done['b'].value) == (1, 2)
    assert 'fewer workers' in done['killed'].failure


def test_nothing_to_do_and_nonsense():
    assert outcomes({}) == {}
    with pytest.raises(ConfigError, match='>= 0'):
        outcomes(MIXED, num_workers=-1)


def test_an_address_without_ray_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(MissingDependencyError, match='pip install'):
        outcomes(MIXED, ray_address='auto')


@pytest.mark.parametrize('address', ['127.0.0.1:1', 'ray://127.0.0.1:1', '127.0.0.1:99999'])
def test_an_address_where_nobody_answers_is_refused_at_once(address):
    with pytest.raises(ConfigError, match=f'{address}.*ray start --head'):
        outcomes(MIXED, ray_address=address)


@pytest.mark.parametrize('address', ['auto', 'nonsense'])
def test_ray_says_the_same_of_addresses_without_a_port(address):
    pytest.importorskip('ray', reason="needs Ray: pip install 'stream3r_ros[ray]'")
    with pytest.raises(ConfigError, match=f'{address}.*ray start --head'):
        outcomes(MIXED, ray_address=address)


def test_every_job_gets_a_gpu_of_the_cluster_where_it_wants_one():
    asked = {(d, n): gpus_per_job(d, n) for d, n in (('cpu', 4), ('auto', 0), ('auto', 2))}
    assert asked == {('cpu', 4): 0, ('auto', 0): 0, ('auto', 2): 1}
    assert gpus_per_job('cuda', 1) == 1
    for device, count in (('cuda', 0), ('cuda:1', 2)):
        with pytest.raises(ConfigError, match=r"model.device.*'cpu'"):
            gpus_per_job(device, count)


def test_the_same_outcomes_on_a_ray_cluster(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(sys.path))  # workers import this module
    ray = pytest.importorskip('ray', reason="needs Ray: pip install 'stream3r_ros[ray]'")
    try:
        done = outcomes({**MIXED, 'killed': die}, ray_address='local')
    finally:
        ray.shutdown()
    assert (done['a'].value, done['b'].value) == (1, 2)
    assert done['bad'].failure == 'the bag is empty; record it anew'
    assert 'Ray worker failed' in done['killed'].failure
