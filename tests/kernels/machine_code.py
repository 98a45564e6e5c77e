"""Contents of compiled kernels: registers, memory accesses and instructions, read from disassemblies.

Used by compile_kernels.py. NVIDIA's tools come in Triton's wheel; AMD's assembly is what Triton's compiler hands out.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import triton

NVIDIA_MIX = {
    "FFMA": "FFMA2?",
    "FADD": "FADD2?",
    "FMUL": "FMUL2?",
    "IMAD": "IMAD",
    "ALU": "P?LOP3|PRMT|F?SEL|[IF]SETP|I?ADD3?|V?IADD3?|SHF|LEA|IABS|(F|I|VI)MNMX3?|F2FP|I2FP|SGXT|POPC|FLO",
    "convert": "I2F|F2I|F2F|I2I",
    "MUFU": "MUFU",
    "SHFL": "SHFL",
    "REDUX": "REDUX",
    "LDS": "LDSM?",
    "STS": "STSM?",
    "BAR": "BAR",
}
"""Columns of the table → opcodes. ALU is the integer and comparison pipe; convert and MUFU share the slowest one."""

AMD_MIX = {
    "FMA": "v_(pk_)?(fma|fmac|mac|mad).*",
    "transcendental": "v_(exp|log|rcp|rsq|sqrt)_.*",
    "DPP": "v_.*_dpp",
    "VALU": "v_.*",
    "SMEM": "s_load_.*|s_buffer_load_.*",
    "waitcnt": "s_waitcnt",
    "barrier": "s_barrier",
    "SALU": "s_.*",
    "DS": "ds_.*",
}
"""The same for AMD; an instruction counts in the first column that it fits."""

AMD_WIDTHS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def mix(opcodes: Iterable[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Instructions by column."""
    counts = dict.fromkeys(columns, 0)
    for opcode, count in Counter(opcodes).items():
        column = next((name for name, pattern in columns.items() if re.fullmatch(pattern, opcode)), None)
        if column is not None:
            counts[column] += count
    return counts


def round_trips(code: Iterable[tuple[str, str, str]]) -> int:
    """How often a thread waits for global memory, from (opcode, suffix, operands) in program order.

    A load belongs to the trip after the last one that an earlier instruction has waited for, by naming a register that
    it loads: warps issue in order. A loop counts as one pass. Asynchronous copies into shared memory count nothing.
    """
    pending: dict[int, int] = {}
    done = trips = 0
    for opcode, suffix, operands in code:
        for register in re.findall(r"\bR(\d+)", operands):
            done = max(done, pending.pop(int(register), 0))
        if opcode == "LDG":
            first = re.match(r"R(\d+)", operands)
            if first is not None:
                trips = max(trips, done + 1)
                for register in range(max(_bits(suffix) // 32, 1)):
                    pending[int(first[1]) + register] = done + 1
    return trips


def _bits(suffix: str) -> int:
    """Width of an access from its opcode's suffix, such as .E.128 or .E.U8."""
    return next((int(part.lstrip("US")) for part in suffix.split(".") if part.lstrip("US").isdigit()), 32)


def _instructions(text: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Returns all of a disassembly's instructions (opcode, suffix, operands), and those that a turn or program runs.

    The second are all, or those of the loop that contains asynchronous copies: a kernel's pipeline.
    """
    line = re.compile(
        r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)((?:\.\w+)*)\s*([^;]*);|^(\.L_\w+):", re.MULTILINE
    )
    code: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for found in line.finditer(text):
        if found[4]:
            labels[found[4]] = len(code)
        else:
            code.append((found[1], found[2], found[3]))
    for place, (opcode, _, operands) in enumerate(code):
        target = re.search(r"\.L_\w+", operands) if opcode == "BRA" else None
        start = labels[target[0]] if target else place
        if any(one == "LDGSTS" for one, _, _ in code[start:place]):
            return code, code[start : place + 1]
    return code, code


def _run_tool(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _widths(widths: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(widths).items(), reverse=True))


def inspect_cubin(binary: bytes) -> dict[str, Any]:
    """Returns an NVIDIA kernel's registers, stack, spills, atomics, accesses by width, instructions and their mix.

    Of a kernel with a pipeline, accesses and instructions are those of one turn of its loop.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        text = _run_tool("nvdisasm", "-c", "-ndf", file.name)
    whole, code = _instructions(text)
    opcodes = [opcode for opcode, _, _ in code if opcode != "NOP"]
    numbers = {name: int(found) for name, found in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "spills": numbers["LOCAL"] + sum(opcode in ("LDL", "STL") for opcode, _, _ in whole),
        "atomics": sum(opcode in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS") for opcode, _, _ in whole),
        "loads": _widths(_bits(suffix) for opcode, suffix, _ in code if opcode in ("LDG", "LDGSTS")),
        "stores": _widths(_bits(suffix) for opcode, suffix, _ in code if opcode == "STG"),
        "round_trips": round_trips(code),
        "instructions": len(opcodes),
        "mix": mix(opcodes, NVIDIA_MIX),
    }


def inspect_assembly(assembly: str) -> dict[str, Any]:
    """The same of an AMD kernel; scalar registers spilled into vector registers cost no memory."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    opcodes = re.findall(r"^\t((?:[sv]|global|flat|buffer|ds|scratch)_\w+)", assembly, re.MULTILINE)
    access = re.compile(r"(?:global|flat|buffer)_(load|store)_[us]?(byte|short|dword(?:x\d)?)(?:_d16\w*)?")
    accesses = [found.groups() for found in map(access.fullmatch, opcodes) if found]
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + sum(opcode.startswith("scratch_") for opcode in opcodes),
        "atomics": sum("_atomic" in opcode or opcode.startswith("ds_add") for opcode in opcodes),
        "loads": _widths(AMD_WIDTHS[width] for kind, width in accesses if kind == "load"),
        "stores": _widths(AMD_WIDTHS[width] for kind, width in accesses if kind == "store"),
        "instructions": len(opcodes),
        "mix": mix(opcodes, AMD_MIX),
    }
