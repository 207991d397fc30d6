#!/usr/bin/env bash
# Trains on two processes over Open MPI on this machine, and compares with one process: crates/refit/tests/mpi.rs.
# Installs Open MPI and libclang (for the bindings) with apt where they are missing. Where they cannot be had, a line says so, and
# nothing fails.
set -euo pipefail
cd "$(dirname "$0")/.."
have() {
  command -v mpirun >/dev/null && command -v mpicc >/dev/null && ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib*/libclang*.so* \
    /usr/lib/*/libclang*.so* 2>/dev/null | grep -q .
}
install() {
  command -v apt-get >/dev/null || return 1
  local root=()
  [ "$(id -u)" = 0 ] || root=(sudo -n)
  export DEBIAN_FRONTEND=noninteractive
  timeout 120 "${root[@]}" apt-get -qq update || true # the lists may be there already
  timeout 420 "${root[@]}" apt-get -qq install -y --no-install-recommends openmpi-bin libopenmpi-dev libclang-dev
}
if ! have && ! install >"${TMPDIR:-/tmp}/refit-mpi-install.log" 2>&1; then
  tail -n 3 "${TMPDIR:-/tmp}/refit-mpi-install.log" >&2
  echo "mpi: skipped, Open MPI and libclang are not here and could not be installed" >&2
  exit 0
fi
mpirun --version | head -n 1
# As the other tests are built, so that their dependencies are used again.
cargo test --workspace --features refit/mpi --locked --test mpi -- --test-threads 1
