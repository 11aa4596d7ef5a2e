# Sourced by the other scripts: virtual environment, launcher options, and tuning for machines without a GPU.
#   RANKS=4           processes on this machine (default: every visible GPU, or 1 on a CPU)
#   PORT=29501        port of the process group (default: a free one; 29500 over several nodes)
#   HOSTFILE=hosts    DeepSpeed host file for several nodes, one line "name slots=8" per node
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$ROOT/.venv/bin:$PATH"
LAUNCH=(deepspeed --quiet)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || { echo "error: $HOSTFILE: no such host file; check HOSTFILE" >&2; exit 2; }
  LAUNCH+=(--hostfile "$HOSTFILE" --master_port "${PORT:-29500}")
else
  PORT=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
  # Without nvidia-smi (containers, AMD) ask PyTorch, which takes seconds to import.
  if { nvidia-smi -L || { { [ -e /dev/nvidia0 ] || [ -e /dev/kfd ]; } &&
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }; } >/dev/null 2>&1; then
    LAUNCH+=(--master_port "$PORT")
    # DeepSpeed ignores CUDA_VISIBLE_DEVICES if --num_gpus is given; without, it uses all visible GPUs.
    if [ -n "${RANKS:-}" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
      IFS=, read -ra GPUS <<<"$CUDA_VISIBLE_DEVICES"
      [ "$RANKS" -le "${#GPUS[@]}" ] || { echo "error: RANKS=$RANKS, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" >&2; exit 2; }
      export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${GPUS[*]:0:RANKS}")
    elif [ -n "${RANKS:-}" ]; then
      LAUNCH+=(--num_gpus "$RANKS")
    fi
  else
    RANKS=${RANKS:-1}
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + RANKS - 1) / RANKS ))}
    # Spinning threads would compete with the loader processes for cores.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
    # 2 MB pages for large tensors: the kernel zeroes every new page, and 4 KB pages are slow.
    export THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1}
    # One malloc arena: the forward and backward threads reuse each other's freed blocks instead of fragmenting two heaps.
    export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1}
    # No mmap for large tensors: glibc would return each freed tensor to the system, and the next one starts in zeroed
    # pages (a fifth of a step's time).
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
    # Keep up to 1 GB of free memory at the top of the heap; by default glibc would trim it in every step.
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1073741824}
    # By default oneDNN and PyTorch each cache 1,024 compiled bf16 kernels with their buffers. With batches of varying
    # length that cache grows by 10 MB per step.
    export ONEDNN_PRIMITIVE_CACHE_CAPACITY=${ONEDNN_PRIMITIVE_CACHE_CAPACITY:-64}
    export LRU_CACHE_CAPACITY=${LRU_CACHE_CAPACITY:-64}
    # DeepSpeed's per-machine launcher, called directly: the `deepspeed` command would start it and only wait, using 0.4 GB.
    WORLD=$(python -c 'import base64, json, sys
print(base64.urlsafe_b64encode(json.dumps({"localhost": list(range(int(sys.argv[1])))}).encode()).decode())' "$RANKS")
    LAUNCH=(python -u -m deepspeed.launcher.launch --quiet --master_port "$PORT" --world_info "$WORLD")
  fi
fi
