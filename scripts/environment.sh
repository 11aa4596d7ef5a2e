# Sourced by the other scripts: the virtual environment, and what a machine without GPU needs.
# RANKS: processes on this machine (default: every GPU, or 1 on a CPU).
export PATH="$PWD/.venv/bin:$PATH"
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  RANKS=${RANKS:-$(nvidia-smi -L | wc -l)}
else
  RANKS=${RANKS:-1}
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + RANKS - 1) / RANKS ))}
  # Threads that spin while they wait would fight with the loader processes over few cores.
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
fi
