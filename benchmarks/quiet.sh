#!/usr/bin/env bash
# The figures of RESULTS.md on a quiet machine, in about 15 minutes on two cores:
#   benchmarks/quiet.sh [FOLDER]        (default: benchmarks/results)
# Needs an environment with the package and ROS 2; one failed step does not stop the others.
# Not in it, for time is not what they measure: equal_bytes.py, carving.py, soak.py, backend_*.py
# but for backend_updates.py.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_WAIT_POLICY=PASSIVE
unset OMP_NUM_THREADS
python=${PYTHON:-python}
failed=0

step() {
  local name=$1
  shift
  echo "== $name: $*  (load $(cut -d' ' -f1 /proc/loadavg))"
  SECONDS=0
  "$@" >"$out/$name.txt" 2>"$out/$name.log" || { failed=1 && tail -3 "$out/$name.log"; }
  tail -12 "$out/$name.txt"
  echo "-- $name took $SECONDS s"
}

step tiny_64x48 $python -m stream3r_ros benchmark --repeats 1 --output "$out/tiny_64x48.json"
step tiny_112x88 $python -m stream3r_ros benchmark --size 112x88 --modes window stac \
  --frames 1 20 100 --chunks 1 4 --repeats 1 --output "$out/tiny_112x88.json"
step tiny_112x88_bf16 $python -m stream3r_ros benchmark --size 112x88 --modes stac \
  --frames 1 100 --repeats 1 --set model.dtype=bfloat16 --output "$out/tiny_112x88_bf16.json"
step naive_64x48 $python benchmarks/naive.py --repeats 2 --output "$out/naive_64x48.json"
step naive_112x88 $python benchmarks/naive.py --size 112x88 --repeats 1 \
  --output "$out/naive_112x88.json"
step mapping $python benchmarks/mapping.py --frames 20 --output "$out/mapping.json"
step latency $python benchmarks/latency.py --duration 15 --log "$out/latency_node.log" \
  --output "$out/latency.json"
step resident $python benchmarks/resident.py --frames 1500 --output "$out/resident.json"
step long_walk env OMP_NUM_THREADS=1 $python benchmarks/long_walk.py --frames 5000 \
  --output "$out/long_walk.json"
step precision env OMP_NUM_THREADS=1 $python benchmarks/precision.py --seeds 4 --frames 50 \
  --output "$out/precision.json"
step backend_updates env OMP_NUM_THREADS=2 $python benchmarks/backend_updates.py --seeds 3 --loops 1
exit $failed
