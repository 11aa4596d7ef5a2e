"""What a run on a CPU keeps in memory, and what it gives back."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from vision_tower.training import cpu_memory as heap
from vision_tower.training.cpu_memory import TrimHeap, trim_heap
from vision_tower.training.precision import cpu_computes_bf16

BLOCK, BLOCKS = 64 * 1024, 4_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_holes_are_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[::2]:
        libc.free(block)
    before = resident()
    assert trim_heap()
    after = resident()
    for block in blocks[1::2]:
        libc.free(block)
    assert before - after > 0.5 * BLOCK * BLOCKS / 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_freed_tensor_gives_its_pages_to_the_next() -> None:
    """64 MB are 16,384 pages, each new one a fault. In a process of its own: it is for good.

    The next is a little smaller: glibc 2.36 asks for some bytes more than an aligned block needs, and where another
    block has come to lie behind the freed one, it is too small for its own size.
    """
    code = """
import resource, sys, torch
from vision_tower.training.cpu_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
tensor = torch.ones(16 * 2**20)
del tensor
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensor = torch.ones(16 * 2**20 - 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults, environment = {}, {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    for way in ("kept", "returned"):
        run = subprocess.run(
            [sys.executable, "-c", code, way], env=environment, capture_output=True, text=True, check=True
        )
        faults[way] = int(run.stdout)
    assert faults["kept"] < 1_000 and faults["returned"] > 10_000


@pytest.mark.skipif(not cpu_computes_bf16(), reason="oneDNN computes bf16 where the CPU does")
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_products_of_many_shapes_leave_little_in_memory() -> None:
    """By what malloc has given out and not got back, after 200 lengths of a batch; set after torch is imported."""
    code = """
import ctypes, sys, torch
from vision_tower.training.cpu_memory import keep_few_primitives
class Said(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in ("fordblks", "keepcost")]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Said
if sys.argv[1] == "few":
    keep_few_primitives()
torch.set_num_threads(1)
weights = torch.ones(256, 256, dtype=torch.bfloat16, requires_grad=True)
def product(length):
    torch.nn.functional.linear(torch.ones(length, 256, dtype=torch.bfloat16), weights).sum().backward()
product(700)
before = libc.mallinfo2().used
for length in range(60, 260):
    product(length)
print(libc.mallinfo2().used - before)
"""
    left, environment = {}, {name: value for name, value in os.environ.items() if name not in heap.PRIMITIVES}
    for way in ("few", "many"):
        run = subprocess.run(
            [sys.executable, "-c", code, way], env=environment, capture_output=True, text=True, check=True
        )
        left[way] = int(run.stdout)
    assert left["few"] < 0.3 * left["many"]


def test_a_heap_that_grows_is_trimmed_and_one_that_does_not_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three steps say what is usual (1040, then 830), and 1.05 of it is still let be."""
    residents = iter([1000, 1040, 1020, 1092, 1093, 800, 830, 790, 871, 872])
    at: list[int] = []
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    state = TrainerState()
    monkeypatch.setattr(heap, "trim_heap", lambda: at.append(state.global_step))
    memory = type("Memory", (), {"memory_info": lambda self: type("Info", (), {"rss": next(residents)})})
    monkeypatch.setattr(heap.psutil, "Process", memory)
    callback = TrimHeap(growth=0.05, settling=3)
    callback.on_train_begin(arguments, state, TrainerControl())
    assert at == [0], "what loading has left"
    at.clear()
    for state.global_step in range(1, 11):
        callback.on_step_end(arguments, state, TrainerControl())
    assert at == [5, 10]
