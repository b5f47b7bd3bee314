"""Turns ptxas's reports (NAME.ARCH.log in a folder) into a Markdown table.

Usage: kernel_table.py FOLDER FAILURES    Lines of failure are added to the file FAILURES.

Occupancy is the share of a multiprocessor's threads that can be resident, by registers, static
shared memory, and the block size that a kernel's `__launch_bounds__` fixes (.maxntid in the PTX),
256 threads where there is none; dynamic shared memory is chosen at launch and not counted.
"""

import pathlib
import re
import sys

# Per multiprocessor: registers, shared memory in bytes, threads, blocks (CUDA programming guide,
# table of technical specifications). Registers are handed out 256 at a time per warp.
LIMITS = {
    70: (65536, 98304, 2048, 32),
    75: (65536, 65536, 1024, 16),
    90: (65536, 233472, 2048, 32),
}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
PTX_ENTRY = re.compile(r"\.entry (\w+)\(.*?\)\s*([^{]*)\{", re.S)
MAX_THREADS = re.compile(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?")


def occupancy(arch: int, threads: int, registers: int, shared: int) -> int:
    """Resident threads in percent."""
    total_registers, total_shared, total_threads, total_blocks = LIMITS[arch]
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = min(
        total_blocks,
        total_threads // (warps * 32),
        (total_registers // per_warp) // warps,
        # The system keeps 1 KB per block on sm_80 and newer.
        total_shared // (shared + (1024 if arch >= 80 else 0)) if shared else total_blocks,
    )
    return round(100 * blocks * warps * 32 / total_threads)


def block_sizes(ptx: str) -> dict[str, int]:
    """Threads of a block by kernel, where the PTX fixes them."""
    sizes = {}
    for entry, directives in PTX_ENTRY.findall(ptx):
        found = MAX_THREADS.search(directives)
        if found:
            x, y, z = (int(side or 1) for side in found.groups())
            sizes[entry] = x * y * z
    return sizes


def main() -> None:
    folder, failures = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    kernels: dict[tuple[str, str], dict[int, dict]] = {}
    for log in sorted(folder.glob("*.*.log")):
        name, arch = log.stem.rsplit(".", 1)
        arch = int(arch)
        ptx = folder / f"{name}.{arch}.ptx"
        sizes = block_sizes(ptx.read_text()) if ptx.exists() else {}
        entry = None
        for line in log.read_text().splitlines():
            if found := ENTRY.search(line):
                entry = {"stack": 0, "spill": 0, "threads": sizes.get(found[1], 256)}
                kernels.setdefault((name, found[1]), {})[arch] = entry
            elif entry is not None and (found := SPILL.search(line)):
                # Functions that are not inlined have lines of their own.
                entry["stack"] = max(entry["stack"], int(found[1]))
                entry["spill"] += int(found[2]) + int(found[3])
            elif entry is not None and (found := USED.search(line)):
                entry["registers"] = int(found[1])
                shared = SHARED.search(line)
                entry["shared"] = int(shared[1]) if shared else 0

    print("Cells: registers per thread, occupancy; what spills is marked. Shared memory is the")
    print("static part, in bytes; block is the largest size that the kernel is compiled for.")
    print()
    print("| file | kernel | block | shared | sm_70 | sm_75 | sm_90 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    lines = []
    for (name, kernel), archs in sorted(kernels.items()):
        cells = []
        for arch in LIMITS:
            entry = archs.get(arch)
            if entry is None or "registers" not in entry:
                cells.append("absent")
                lines.append(f"{kernel} is absent for sm_{arch}")
                continue
            percent = occupancy(arch, entry["threads"], entry["registers"], entry["shared"])
            cell = f"{entry['registers']}, {percent} %"
            if entry["spill"]:
                cell += f", **spills {entry['spill']} bytes**"
                lines.append(f"{kernel} spills {entry['spill']} bytes on sm_{arch}")
            elif entry["stack"]:
                cell += f", {entry['stack']} bytes of stack"
            cells.append(cell)
        shared = sorted({entry.get("shared", 0) for entry in archs.values()})
        block = sorted({entry["threads"] for entry in archs.values()})
        columns = ["/".join(map(str, block)), "/".join(map(str, shared)), *cells]
        print(f"| {name} | {kernel} | {' | '.join(columns)} |")
    print()
    print(f"{len(kernels)} kernels; {len(lines)} spill or do not assemble.")
    with failures.open("a") as file:
        file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
